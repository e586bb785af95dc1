"""Linear layers per group of samples: knowledge that samples share is turned into weights once.

The samples are sorted by group. On CUDA with bfloat16 elements, aligned widths and a GPU that has the
kernel, one grouped GEMM (`torch.nn.functional.grouped_mm`) follows, whose group ends stay on the device:
nothing waits for the host. Elsewhere the sorted samples are split and multiplied group by group, which
has to know the sizes: free on a CPU, one synchronisation on CUDA (the dispatcher prefers the fused
strategy there).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from trainer.ops.activation import activate_, activation_gradient, activation_name
from trainer.ops.dispatch import AUTOCAST_TYPE, apply_function, is_plain_eager, without_autocast

_ALIGNMENT = 16  # bytes of every row that grouped_mm wants


class Groups(NamedTuple):
    """Samples sorted by group: `order` int64 [B], `ends` int32 [S], the end of each group in it."""

    order: Tensor
    ends: Tensor


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [B, d] of a table [S, d] by index, int64 [B]; its gradient has the same bits on every run.

    `table[index]` has not on a CPU: its gradient adds up in whatever order threads arrive. Nor has
    `index_select` on CUDA, which adds by atomics; an embedding sorts, but is the slower on a CPU. The
    compiler would add by atomics in all of them, and take an index that is negative or too large.

    Raises:
        IndexError: If an index is not in [0, S) (on CUDA, asynchronously).
    """
    return _take_rows(table, index) if torch.compiler.is_compiling() else _look_up(table, index)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, table) if table.is_cuda else table.index_select(0, index)


@torch.library.custom_op("llm4msr::take_rows", mutates_args=())
def _take_rows(table: Tensor, index: Tensor) -> Tensor:
    return _look_up(table, index)


@torch.library.custom_op("llm4msr::add_rows", mutates_args=())
def _add_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """The gradient of `take_rows`: sums [size, d] of the rows [B, d] that have an index."""
    if rows.is_cuda:
        return torch.ops.aten.embedding_dense_backward(rows, index, size, -1, False)
    return rows.new_zeros(size, rows.shape[1]).index_add_(0, index, rows)


@_take_rows.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(index.shape[0], table.shape[1])


@_add_rows.register_fake
def _(rows: Tensor, index: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, rows.shape[1])


def _save_index(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    table, index = inputs
    ctx.size = table.shape[0]
    ctx.save_for_backward(index)


def _gradient_of_rows(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return _add_rows(dy.contiguous(), *ctx.saved_tensors, ctx.size), None


_take_rows.register_autograd(_gradient_of_rows, setup_context=_save_index)


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raises for inputs that carry a tangent: an operator of ours would answer with a silent zero.

    Raises:
        NotImplementedError: If one does.
    """
    if torch.compiler.is_compiling():
        return
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "meta layers have no forward-mode derivative (torch.func.jvp, jacfwd); use backward()"
        )


def _sort(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    # A sample outside the groups would get a row of memory that nothing wrote, or another group's layer.
    ordered, order = torch.sort(group, stable=True)
    if ordered.is_cuda:
        inside = (ordered[:1] >= 0) & (ordered[-1:] < num_groups)
        torch._assert_async(inside.all(), f"grouped_linear: a group outside [0, {num_groups})")
    elif len(ordered):
        first, last = ordered[0].item(), ordered[-1].item()
        if first < 0 or last >= num_groups:
            raise ValueError(
                f"grouped_linear: groups from {first} to {last}, outside [0, {num_groups})"
            )
    ends = torch.searchsorted(
        ordered, torch.arange(num_groups, device=group.device), right=True, out_int32=True
    )
    return order, ends


# An operator, so that the check is left as it is by the compiler.
_sort_groups = torch.library.custom_op("llm4msr::sort_groups", _sort, mutates_args=())


@_sort_groups.register_fake
def _(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    return (
        group.new_empty(group.shape, dtype=torch.int64),
        group.new_empty(num_groups, dtype=torch.int32),
    )


def sort_groups(group: Tensor, num_groups: int) -> Groups:
    """Sorts samples by their group [B] in [0, num_groups), without waiting for the device.

    Raises:
        ValueError: If a group is outside (on CUDA: a failed assertion, asynchronously).
    """
    sort = _sort if is_plain_eager(group) else _sort_groups
    return Groups(*sort(group, num_groups))


def group_by_key(keys: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Finds which samples share a key, so that knowledge is generated once per key.

    `meta_linear(h, g[first], weight, bias, group=group)` then equals `meta_linear(h, g, weight, bias)`
    if samples of one key have one knowledge vector.

    Args:
        keys: Key of each sample, int64 [B], any values.
        size: Upper bound on distinct keys, known beforehand. Without it the number has to be read
            from the device, which on CUDA makes the host wait; data loaders know it for free.

    Returns:
        first: A sample of each distinct key, int64 [S]; with `size`, S = size and rows beyond the
            distinct keys are 0 (S = 0 in an empty batch, which has no sample 0).
        group: Row of `first` for each sample, int64 [B].

    Raises:
        RuntimeError: If there are more distinct keys than `size` (on CUDA, asynchronously).
    """
    ordered, order = torch.sort(keys, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    rank = new.cumsum(0) - 1
    group = torch.empty_like(order).scatter_(0, order, rank)
    if size is None:
        return order[new], group
    torch._assert_async((rank[-1:] < size).all(), "group_by_key: more distinct keys than size")
    size = size if len(keys) else 0
    first = order.new_zeros(size).scatter_add_(0, rank.clamp(max=size - 1), order * new)
    return first, group


def can_group_on_device(
    dtype: torch.dtype, in_features: int, out_features: int, device: torch.device | None = None
) -> bool:
    """Whether CUDA has a grouped GEMM for these elements and widths; without a GPU, a Hopper's answer.

    `grouped_mm` takes more than that, float16 or an A100: but there it reads the ends of the groups
    back to the host and loops over them, as it says nowhere but in PyTorch's GroupedMMUtils.h.
    """
    if dtype != torch.bfloat16:
        return False
    if torch.cuda.is_available() and torch.cuda.get_device_properties(device).major not in (9, 10):
        return False
    return all(width * dtype.itemsize % _ALIGNMENT == 0 for width in (in_features, out_features))


def _on_device(h: Tensor, weight: Tensor) -> bool:
    return h.is_cuda and can_group_on_device(h.dtype, weight.shape[2], weight.shape[1], h.device)


def _unsort(rows: Tensor, order: Tensor) -> Tensor:
    """Puts sorted rows back. A gather of rows: PyTorch's scatters are ten times slower on a CPU."""
    positions = torch.arange(order.shape[0], device=order.device)
    return rows.index_select(0, torch.empty_like(order).scatter_(0, order, positions))


def _spans(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(group, start, end) of every group."""
    start = 0
    for s, end in enumerate(ends.tolist()):
        yield s, start, end
        start = end


def split_forward(h: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """Outputs of sorted samples, group by group."""
    y = h.new_empty(h.shape[0], weight.shape[1])
    for s, start, end in _spans(ends):
        if end > start:
            torch.addmm(bias[s], h[start:end], weight[s].t(), out=y[start:end])
    return y


def split_backward(
    dz: Tensor, h: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias of sorted samples, group by group; groups without samples get 0."""
    dh, dweight = torch.empty_like(h), torch.empty_like(weight)
    dbias = weight.new_zeros(weight.shape[:2])
    for s, start, end in _spans(ends):
        if end == start:
            dweight[s].zero_()
            continue
        part = dz[start:end]
        torch.mm(part, weight[s], out=dh[start:end])
        torch.mm(part.t(), h[start:end], out=dweight[s])
        torch.sum(part, 0, out=dbias[s])
    return dh, dweight, dbias


def device_forward(h: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """As `split_forward`, as one grouped GEMM. Its output and the bias meet in float32."""
    y = F.grouped_mm(h, weight.transpose(1, 2), offs=ends)
    rows = torch.arange(h.shape[0], device=h.device, dtype=ends.dtype)
    group = torch.searchsorted(ends, rows, right=True)
    return (y.float() + bias[group].float()).to(h.dtype)


def device_backward(
    dz: Tensor, h: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `split_backward`, as two grouped GEMMs and a segmented sum."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    dh = F.grouped_mm(dz, weight, offs=ends)
    dweight = F.grouped_mm(dz.t(), h, offs=ends)
    # An empty group has nothing to multiply; do not rely on what that leaves in memory.
    dweight = dweight.masked_fill((sizes == 0)[:, None, None], 0)
    dbias = torch.segment_reduce(
        dz.float(), "sum", lengths=sizes.long(), axis=0, unsafe=True, initial=0
    )
    return dh, dweight, dbias.to(dz.dtype)


def _forward(
    h: Tensor, weight: Tensor, bias: Tensor, order: Tensor, ends: Tensor, activation: str
) -> Tensor:
    forward = device_forward if h.shape[0] and _on_device(h, weight) else split_forward
    y = forward(h.index_select(0, order), weight.contiguous(), bias, ends)
    return _unsort(activate_(y, activation), order)


def _backward(
    dy: Tensor,
    y: Tensor,
    h: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(h):
        dz = activation_gradient(dy, y, activation)
        backward = device_backward if h.shape[0] and _on_device(h, weight) else split_backward
        dz, h = dz.index_select(0, order), h.index_select(0, order)
        dh, dweight, dbias = backward(dz, h, weight.contiguous(), ends)
        return _unsort(dh, order), dweight, dbias


_grouped = torch.library.custom_op("llm4msr::grouped_linear", _forward, mutates_args=())
_grouped_backward = torch.library.custom_op(
    "llm4msr::grouped_linear_backward", _backward, mutates_args=()
)


@_grouped.register_fake
def _(
    h: Tensor, weight: Tensor, bias: Tensor, order: Tensor, ends: Tensor, activation: str
) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[1])


@_grouped_backward.register_fake
def _(
    dy: Tensor,
    y: Tensor,
    h: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:2]),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    h, weight, _, order, ends, ctx.activation = inputs
    y = h if ctx.activation == "none" else output
    ctx.save_for_backward(y, h, weight, order, ends)


def _gradient(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    dh, dweight, dbias = _grouped_backward(dy.contiguous(), *ctx.saved_tensors, ctx.activation)
    return dh, dweight, dbias, None, None, None


class _Grouped(torch.autograd.Function):
    """The same pair where nobody looks at operators (`is_plain_eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, h, weight, order, ends = ctx.saved_tensors
        gradients = _backward(dy.contiguous(), y, h, weight, order, ends, ctx.activation)
        return *gradients, None, None, None


_grouped.register_autograd(_gradient, setup_context=_save)
for _device in ("cpu", "cuda"):
    _grouped.register_autocast(_device, AUTOCAST_TYPE)


def grouped_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    group: Tensor | Groups,
    activation: str | None = None,
) -> Tensor:
    """A linear layer per group of samples: y_b = act(weight[group_b] h_b + bias[group_b]).

    Args:
        h: Inputs [B, i].
        weight: One matrix per group [S, o, i].
        bias: One bias per group [S, o].
        group: Group of each sample, int64 [B], values in [0, S); or, where several layers share it,
            the result of `sort_groups`.
        activation: None, "relu", "leaky_relu", "sigmoid" or "tanh".

    Returns:
        Outputs [B, o]. Samples of one group never reach the weights of another, forward or backward.

    Raises:
        ValueError: If a group is outside [0, S), not every sample has one, `Groups` are of another
            number of groups, or the activation is unknown.
        NotImplementedError: If forward-mode derivatives are asked for.
    """
    groups = group if isinstance(group, Groups) else sort_groups(group, weight.shape[0])
    if groups.order.shape != h.shape[:1]:
        raise ValueError(f"grouped_linear: {len(groups.order)} groups for {len(h)} samples")
    if groups.ends.shape[0] != weight.shape[0]:
        raise ValueError(
            f"grouped_linear: sorted into {len(groups.ends)} groups, weights for {len(weight)}"
        )
    refuse_forward_mode(h, weight, bias)
    rest = (groups.order, groups.ends, activation_name(activation))
    if is_plain_eager(h, weight, bias):
        return apply_function(_Grouped, (h, weight, bias), *rest)
    return _grouped(h, weight, bias, *rest)
