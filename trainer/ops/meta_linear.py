"""The meta-layer op: a linear layer whose weights are generated per sample from a knowledge vector.

    y_b = act( sum_j g~_bj (A_j h_b + c_j) ),   g~ = [g, 1]

`weight` [r+1, o, i] stacks the generator slices A_0..A_{r-1} and the shared layer A_r; `bias` [r+1, o]
likewise. This equals act(W_b h_b + b_b) with W_b = A_r + sum_j g_bj A_j: the linear meta network of
LLM4MSR, without ever storing W_b [B, o, i] or the product of g and h [B, r, i].

Slices may be diagonals, `weight` [r+1, o] and i = o: A_j h is then their elementwise product.

Three strategies compute the same numbers:
- fused: Triton kernels for CUDA. 2 B (r+1) i o operations forward, twice that backward.
- grouped: samples that share a knowledge vector (all impressions of one scenario) share one generated
  weight, built once per distinct vector: r times fewer products when few are distinct.
- reference: the fused algorithm as a loop of library products. Any device.

A fourth, warp_specialised, computes as fused does, for H100 and H200. It has never run, and "auto" never
takes it (`trainer.ops.experimental`).
"""

import importlib.util
import math

import torch
from torch import Tensor

from trainer.ops.activation import activation_name
from trainer.ops.dispatch import AUTOCAST_TYPE, autocasts
from trainer.ops.grouped import (
    can_group_on_device,
    grouped_linear,
    refuse_forward_mode,
    take_rows,
)
from trainer.ops.reference import (
    diagonal_linear,
    meta_linear_fused,
    meta_linear_reference,
    meta_linear_specialised,
)
from trainer.ops.warp_specialised import missing_for_warp_specialised

STRATEGIES = ("auto", "fused", "grouped", "reference", "warp_specialised")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The generated weights are saved for the backward pass, and their gradient is as large. Where they grow
# with the batch, as with a knowledge row per user, they are what the op exists to avoid; at a thousand
# scenarios of 256 x 256 in float32 they are this much.
_MOST_GENERATED_BYTES = 256 << 20
_ROWS_PER_DIAGONAL = 2  # from which grouped is faster on a CPU, as measured


def min_rows_per_group(device: str, rank: int, in_features: int, out_features: int) -> float:
    """Rows per knowledge row from which grouped is faster than going through all slices.

    On a CPU as measured (docs/results/meta-layer.md): generating a weight costs about as much as six
    rows, and a group's calls of the library as much as 300,000 multiplications. On CUDA from arithmetic alone
    (peak rates of an H200, nobody has measured it): a group's weights have to be generated, written
    and read, and each group is padded to a tile of 64 rows.
    """
    if device == "cuda":
        return 1 + 311 / max(rank, 1)
    return 6 + 3e5 / ((rank + 1) * max(in_features * out_features, 1))


def missing_for(strategy: str, device: str) -> str | None:
    """What a strategy lacks on a device, "cpu" or "cuda"; None where it can run."""
    if strategy == "warp_specialised":
        return missing_for_warp_specialised(device)
    if strategy != "fused":
        return None
    if not _HAS_TRITON:
        return "the package triton"
    if device != "cuda":
        from trainer.ops.triton_tiles import INTERPRETING

        if not INTERPRETING:
            return "CUDA, or Triton's interpreter (TRITON_INTERPRET=1)"
    return None


def choose_strategy(
    rows: int,
    rank: int,
    in_features: int,
    out_features: int,
    *,
    groups: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    diagonal: bool = False,
) -> tuple[str, str]:
    """What `strategy="auto"` takes, and why.

    Args:
        rows: Samples B.
        rank: Width r of the knowledge vectors.
        in_features: Width i.
        out_features: Width o.
        groups: Distinct knowledge rows S, or None if every sample brings its own.
        device: "cpu" or "cuda".
        dtype: Of the products (under autocast, the type it casts to).
        diagonal: Whether the slices are diagonals.

    Returns:
        "fused", "grouped" or "reference", and the reason in words.
    """
    strategy, why = _choose(rows, rank, in_features, out_features, groups, device, dtype, diagonal)
    needed = min_rows_per_group(device, rank, in_features, out_features)
    generated = (groups or 0) * in_features * out_features * dtype.itemsize
    return strategy, why.format(needed=math.ceil(needed), groups=groups, mib=generated / (1 << 20))


def _choose(
    rows: int,
    rank: int,
    in_features: int,
    out_features: int,
    groups: int | None,
    device: str,
    dtype: torch.dtype,
    diagonal: bool,
) -> tuple[str, str]:
    """As `choose_strategy`, numbers not yet in the words: the compiler cannot format those of a shape."""
    fused = device == "cuda" and _HAS_TRITON and dtype in _FUSED_DTYPES
    needed = min_rows_per_group(device, rank, in_features, out_features)
    generated = (groups or 0) * in_features * out_features * dtype.itemsize
    why = "every row has its own knowledge" if groups is None else "too few rows per knowledge row"
    if diagonal:  # bound by memory: fused never writes the scales [B, o], grouped has to
        if fused:
            return "fused", "diagonals are made where they are used; Triton kernels"
        if groups is not None and rows >= _ROWS_PER_DIAGONAL * groups:
            return "grouped", f"at least {_ROWS_PER_DIAGONAL} rows per knowledge row"
        return "reference", why
    if groups is not None and generated > _MOST_GENERATED_BYTES:
        why = "weights of {groups:,} knowledge rows would take {mib:,.0f} MiB"
    elif groups is not None and rows >= needed * groups:
        if device != "cuda" or can_group_on_device(dtype, in_features, out_features):
            return "grouped", "at least {needed} rows per knowledge row"
        if not fused:
            return (
                "grouped",
                "many rows per knowledge row; sizes of groups are read from the device",
            )
        return "fused", "no grouped product on this device for this type or these widths"
    if fused:
        return "fused", f"{why}; Triton kernels"
    if device == "cuda" and not _HAS_TRITON:
        return "reference", f"{why}; triton is not installed"
    return "reference", f"{why}; no kernel for {device} {str(dtype).removeprefix('torch.')}"


def explain_strategy(
    rows: int,
    rank: int,
    in_features: int,
    out_features: int,
    *,
    groups: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    strategy: str = "auto",
    diagonal: bool = False,
) -> str:
    """One line to print at start-up: the layer, the strategy taken, and why.

    Args:
        rows: Samples B.
        rank: Width r of the knowledge vectors.
        in_features: Width i.
        out_features: Width o.
        groups: Distinct knowledge rows S, or None if every sample brings its own.
        device: "cpu" or "cuda".
        dtype: Of the products.
        strategy: What was configured; other than "auto" it is taken as it is.
        diagonal: Whether the slices are diagonals.
    """
    chosen, why = strategy, "configured"
    if strategy == "auto":
        chosen, why = choose_strategy(
            *(rows, rank, in_features, out_features),
            groups=groups,
            device=device,
            dtype=dtype,
            diagonal=diagonal,
        )
    shared = "" if groups is None else f", {groups:,} knowledge rows"
    name = str(dtype).removeprefix("torch.")
    widths = f"diagonal of {out_features}" if diagonal else f"{in_features} to {out_features}"
    layer = f"{widths}, rank {rank}, {rows:,} rows{shared}, {device} {name}"
    return f"meta layer {layer}: {chosen} ({why})"


def _check(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor | None) -> None:
    rows = h.shape[0] if group is None else g.shape[0]
    full = (g.shape[-1] + 1, bias.shape[-1], h.shape[-1])
    diagonal = (g.shape[-1] + 1, h.shape[-1])
    fits = weight.shape == (full if weight.dim() == 3 else diagonal)
    if h.dim() != 2 or g.dim() != 2 or g.shape[0] != rows or not fits:
        raise ValueError(
            f"meta_linear: h {tuple(h.shape)}, g {tuple(g.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias.shape)} do not fit [B,i], [B,r], [r+1,o,i], [r+1,o], nor with "
            f"diagonals [B,o], [B,r], [r+1,o], [r+1,o]"
        )
    types = {tensor.dtype for tensor in (h, g, weight, bias)}
    if len(types) > 1 and not autocasts(h.device.type):
        names = ", ".join(sorted(str(tensor).removeprefix("torch.") for tensor in types))
        raise ValueError(f"meta_linear: h, g, weight and bias must be of one type, not {names}")
    if group is not None and group.shape != h.shape[:1]:
        raise ValueError(f"meta_linear: group {tuple(group.shape)} must be {tuple(h.shape[:1])}")
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"meta_linear: bias {tuple(bias.shape)} must be {tuple(weight.shape[:2])}")


def _grouped(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor, activation: str
) -> Tensor:
    """Generates one weight per knowledge row, as one product, and applies it to the row's samples."""
    if weight.dim() == 2:
        return diagonal_linear(h, g, weight, bias, group, activation)
    gates = torch.cat([g, g.new_ones(g.shape[0], 1)], dim=1)
    generated = (gates @ weight.flatten(1)).view(g.shape[0], *weight.shape[1:])
    return grouped_linear(h, generated, gates @ bias, group, activation)


def _strategy_for(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor | None) -> str:
    """What "auto" takes for these arguments of `meta_linear`, autocast counted in."""
    device = h.device.type
    cast = autocasts(device) and h.dtype != torch.float64  # which stays
    strategy, _ = _choose(
        h.shape[0],
        g.shape[1],
        h.shape[1],
        bias.shape[1],
        None if group is None else g.shape[0],
        device,
        AUTOCAST_TYPE if cast else h.dtype,
        weight.dim() == 2,
    )
    return strategy


def meta_linear(
    h: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    group: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
) -> Tensor:
    """Applies a generated linear layer to each sample (see the module's equation).

    Samples never reach each other's outputs. Saved for the backward pass: the inputs, and the output
    if there is an activation (of diagonals, where no kernel runs, also what they generate). Gradients
    are deterministic: the same bits on every run.

    Args:
        h: Layer inputs [B, i].
        g: Knowledge vectors [B, r]; with `group`, the distinct ones [S, r].
        weight: Generator slices and the shared layer [r+1, o, i]; as diagonals [r+1, o], i = o.
        bias: Their biases [r+1, o].
        group: Which row of `g` belongs to each sample, int64 [B], values in [0, S)
            (`trainer.ops.group_by_key` finds it where only keys are known).
        activation: None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh".
        strategy: "auto", "fused" (CUDA), "reference", "grouped" (which needs `group`), or
            "warp_specialised" (bfloat16 on an H100 or H200, never run).

    Returns:
        Outputs [B, o]. With g = 0 they are those of the shared layer alone.

    Raises:
        ValueError: If shapes or types do not fit, or the strategy or activation is unknown or impossible, or
            (grouped, on a CPU) a group is outside [0, S).
        IndexError: If it is for another strategy, or for diagonals. On CUDA an assertion fails,
            asynchronously.
        NotImplementedError: If forward-mode derivatives are asked for.
    """
    _check(h, g, weight, bias, group)
    name = activation_name(activation)
    if strategy == "auto":
        strategy = _strategy_for(h, g, weight, bias, group)
    if strategy == "grouped":
        if group is None:
            raise ValueError(
                "meta_linear: strategy grouped needs group, the row of g for each sample"
            )
        return _grouped(h, g, weight, bias, group, name)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"meta_linear: unknown strategy {strategy!r}; use one of {', '.join(STRATEGIES)}"
        )
    if strategy == "fused" and not _HAS_TRITON:
        raise ValueError(
            f"meta_linear: strategy fused needs {missing_for(strategy, h.device.type)}"
        )
    per_sample = g if group is None else take_rows(g, group)
    if strategy == "reference" and weight.dim() == 2:
        return diagonal_linear(h, per_sample, weight, bias, None, name)
    refuse_forward_mode(h, per_sample, weight, bias)
    ops = {
        "fused": meta_linear_fused,
        "reference": meta_linear_reference,
        "warp_specialised": meta_linear_specialised,
    }
    return ops[strategy](h, per_sample, weight, bias, name)
