"""The meta-layer op: a linear layer whose weights are generated per sample from a knowledge vector.

    y_b = act( sum_j g~_bj (A_j h_b + c_j) ),   g~ = [g, 1]

`weight` [r+1, o, i] stacks the generator slices A_0..A_{r-1} and the shared layer A_r; `bias` [r+1, o]
likewise. This equals act(W_b h_b + b_b) with W_b = A_r + sum_j g_bj A_j: the linear meta network of
LLM4MSR, without ever storing W_b [B, o, i] or the product of g and h [B, r, i].

Two strategies compute the same numbers:
- reference: a loop over the r+1 slices, scaled after the product. Any device, any batch.
- grouped: samples that share a knowledge vector (all impressions of one scenario) share one generated
  weight, so it is built once per distinct vector: r times fewer products when few are distinct.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Grouped wins when a group holds at least this many rows on average: building W costs r products of a
# row each, paid once per group instead of once per row.
MIN_ROWS_PER_GROUP = 8


@torch.library.custom_op("llm4msr::meta_linear", mutates_args=())
def _meta_linear(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.addmm(bias[-1], h, weight[-1].t())
    y.addmm_(g, bias[:-1])
    for j in range(g.shape[1]):
        y.addcmul_(g[:, j : j + 1], h @ weight[j].t())
    return y


@_meta_linear.register_fake
def _(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[1])


@torch.library.custom_op("llm4msr::meta_linear_backward", mutates_args=())
def _meta_linear_backward(
    dy: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # V_j = dy A_j serves both dh (scaled by g_j) and dg_j (its inner product with h): two products per
    # slice in all, nothing saved from the forward pass but its inputs.
    dh = dy @ weight[-1]
    dg = dy @ bias[:-1].t()
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dweight[-1] = dy.t() @ h
    dbias[-1] = dy.sum(0)
    dbias[:-1] = g.t() @ dy
    for j in range(g.shape[1]):
        gate = g[:, j : j + 1]
        v = dy @ weight[j]
        dh.addcmul_(gate, v)
        dg[:, j] += (v * h).sum(1)
        dweight[j] = (gate * dy).t() @ h
    return dh, dg, dweight, dbias


@_meta_linear_backward.register_fake
def _(
    dy: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        g.new_empty(g.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _save_inputs(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, ...]:
    return _meta_linear_backward(dy.contiguous(), *ctx.saved_tensors)  # type: ignore[attr-defined]


_meta_linear.register_autograd(_backward, setup_context=_save_inputs)
# Without a cast rule a mixed-dtype call fails inside the op, or returns a dtype that the fake denies.
for _device in ("cpu", "cuda"):
    _meta_linear.register_autocast(_device, torch.bfloat16)


def grouped_linear(h: Tensor, weight: Tensor, bias: Tensor, group: Tensor) -> Tensor:
    """A linear layer per group of samples: y_b = weight[group_b] h_b + bias[group_b].

    Args:
        h: Inputs [B, i].
        weight: One matrix per group [S, o, i].
        bias: One bias per group [S, o].
        group: Group of each sample, int64 [B], values in [0, S).

    Returns:
        Outputs [B, o]. Samples of one group never reach the weights of another, forward or backward.
    """
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=weight.shape[0])
    pieces = h[order].split(counts.tolist())
    parts = [F.linear(piece, weight[s], bias[s]) for s, piece in enumerate(pieces)]
    return torch.cat(parts)[torch.argsort(order)]


def _check(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor | None) -> None:
    rows = h.shape[0] if group is None else g.shape[0]
    expected = (g.shape[-1] + 1, bias.shape[-1], h.shape[-1])
    if h.dim() != 2 or g.dim() != 2 or g.shape[0] != rows or weight.shape != expected:
        raise ValueError(
            f"meta_linear: h {tuple(h.shape)}, g {tuple(g.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias.shape)} do not fit [B,i], [B,r], [r+1,o,i], [r+1,o]"
        )
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"meta_linear: bias {tuple(bias.shape)} must be {tuple(weight.shape[:2])}")


def choose_strategy(rows: int, groups: int | None) -> str:
    """Chooses by shape: grouped when knowledge rows are known to be shared by enough samples."""
    if groups is not None and rows >= MIN_ROWS_PER_GROUP * groups:
        return "grouped"
    return "reference"


def meta_linear(
    h: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    group: Tensor | None = None,
    strategy: str = "auto",
) -> Tensor:
    """Applies a generated linear layer to each sample (see the module's equation, without activation).

    Args:
        h: Layer inputs [B, i].
        g: Knowledge vectors [B, r]; with `group`, the distinct ones [S, r].
        weight: Generator slices and the shared layer [r+1, o, i].
        bias: Their biases [r+1, o].
        group: Which row of `g` belongs to each sample, int64 [B].
        strategy: "auto", "reference" or "grouped" (which needs `group`).

    Returns:
        Outputs [B, o]. With g = 0 they are those of the shared layer alone.

    Raises:
        ValueError: If shapes do not fit, or the strategy is unknown or impossible.
    """
    _check(h, g, weight, bias, group)
    if strategy == "auto":
        strategy = choose_strategy(h.shape[0], None if group is None else g.shape[0])
    if strategy == "grouped":
        if group is None:
            raise ValueError(
                "meta_linear: strategy grouped needs group, the row of g for each sample"
            )
        generated = weight[-1] + torch.tensordot(g, weight[:-1], dims=1)
        return grouped_linear(h, generated, bias[-1] + g @ bias[:-1], group)
    if strategy != "reference":
        raise ValueError(
            f"meta_linear: unknown strategy {strategy!r}; use auto, reference or grouped"
        )
    return _meta_linear(h, g if group is None else g[group], weight, bias)
