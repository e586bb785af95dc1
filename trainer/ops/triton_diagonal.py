"""Triton kernels of the fused strategy where the slices are diagonals (`weight` [r+1, o], i = o).

    y_b = act( s_b * h_b + c_b ),   s_b = sum_j g~_bj weight_j,   c_b = sum_j g~_bj bias_j

Bound by memory, so what counts is how often arrays of [B, o] are read and written: twice forward (h, y),
five times backward (dz, h, dh; dz, h), besides the partial sums of dg. Scales and biases are made where they
are used and never written.
Sums in float32, no atomics: two runs give the same bits. Needs `triton` to import.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.ops.triton_tiles import (
    ACTIVATION_CODES,
    activate_tile,
    any_size,
    choose_tile,
    dot,
    load_gates,
    load_slices,
    multiprocessors,
    padded,
    share_of_batch,
    start,
)

# Slices at a time: few, since each takes registers of two products and their three TF32 parts.
_SLICES = tl.constexpr(16)


@any_size
def diagonal_forward(
    h,
    g,
    weight,
    bias,
    y,
    ROWS,
    RANK,
    OUT,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One [BM, BN] tile of y [ROWS, OUT]."""
    first = tl.program_id(0).to(tl.int64) * BM
    h += first * OUT
    g += first * RANK
    y += first * OUT
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_m, in_n = m < ROWS - first, n < OUT
    inside = in_m[:, None] & in_n[None, :]
    x = tl.load(h + m[:, None] * OUT + n[None, :], mask=inside, other=0.0)
    scale = tl.zeros((BM, BN), tl.float32)
    shift = tl.zeros((BM, BN), tl.float32)
    for j0 in range(0, RANK + 1, _SLICES):
        j = j0 + tl.arange(0, _SLICES)
        gates = load_gates(g, m, in_m, j, RANK)
        a = load_slices(weight, j, n, in_n, RANK, OUT)
        c = load_slices(bias, j, n, in_n, RANK, OUT)
        scale = dot(gates, a, scale, PRECISION)
        shift = dot(gates, c, shift, PRECISION)
    z = activate_tile(scale * x.to(tl.float32) + shift, ACTIVATION)
    tl.store(y + m[:, None] * OUT + n[None, :], z.to(y.dtype.element_ty), mask=inside)


@any_size
def diagonal_backward_input(
    dz,
    h,
    g,
    weight,
    bias,
    dh,
    dg,
    ROWS,
    RANK,
    OUT,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One [BM, BN] tile of dh [ROWS, OUT], and its share of dg, float32 [tiles of OUT, ROWS, RANK]."""
    first = tl.program_id(0).to(tl.int64) * BM
    dz += first * OUT
    h += first * OUT
    g += first * RANK
    dh += first * OUT
    dg += (tl.program_id(1).to(tl.int64) * ROWS + first) * RANK
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_m, in_n = m < ROWS - first, n < OUT
    inside = in_m[:, None] & in_n[None, :]
    d = tl.load(dz + m[:, None] * OUT + n[None, :], mask=inside, other=0.0)
    x = tl.load(h + m[:, None] * OUT + n[None, :], mask=inside, other=0.0)
    dscale = (d.to(tl.float32) * x.to(tl.float32)).to(x.dtype)
    scale = tl.zeros((BM, BN), tl.float32)
    for j0 in range(0, RANK + 1, _SLICES):
        j = j0 + tl.arange(0, _SLICES)
        gates = load_gates(g, m, in_m, j, RANK)
        a = load_slices(weight, j, n, in_n, RANK, OUT)
        c = load_slices(bias, j, n, in_n, RANK, OUT)
        scale = dot(gates, a, scale, PRECISION)
        share = tl.zeros((BM, _SLICES), tl.float32)
        share = dot(dscale, tl.trans(a), share, PRECISION)
        share = dot(d, tl.trans(c), share, PRECISION)
        to_j = in_m[:, None] & (j < RANK)[None, :]
        tl.store(dg + m[:, None] * RANK + j[None, :], share, mask=to_j)
    gradient = (scale * d.to(tl.float32)).to(dh.dtype.element_ty)
    tl.store(dh + m[:, None] * OUT + n[None, :], gradient, mask=inside)


@any_size
def diagonal_backward_weight(
    dz,
    h,
    g,
    dweight,
    dbias,
    ROWS,
    RANK,
    OUT,
    rows_per_share,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """_SLICES x BN numbers of both gradients over one share of the batch, float32 [shares, RANK+1, OUT]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * _SLICES + tl.arange(0, _SLICES)
    share = tl.program_id(2).to(tl.int64)
    first = share * rows_per_share
    dz += first * OUT
    h += first * OUT
    g += first * RANK
    rows = tl.minimum(ROWS - first, rows_per_share).to(tl.int32)
    k = tl.arange(0, BK)
    in_n = n < OUT
    of_weight = tl.zeros((_SLICES, BN), tl.float32)
    of_bias = tl.zeros((_SLICES, BN), tl.float32)
    for k0 in range(0, rows, BK):
        in_k = k < rows - k0
        b = k0 + k
        inside = in_k[:, None] & in_n[None, :]
        d = tl.load(dz + b[:, None] * OUT + n[None, :], mask=inside, other=0.0)
        x = tl.load(h + b[:, None] * OUT + n[None, :], mask=inside, other=0.0)
        gates = tl.trans(load_gates(g, b, in_k, j, RANK))
        dscale = (d.to(tl.float32) * x.to(tl.float32)).to(x.dtype)
        of_weight = dot(gates, dscale, of_weight, PRECISION)
        of_bias = dot(gates, d, of_bias, PRECISION)
    cells = (share * (RANK + 1) + j)[:, None] * OUT + n[None, :]
    inside = (j <= RANK)[:, None] & in_n[None, :]
    tl.store(dweight + cells, of_weight, mask=inside)
    tl.store(dbias + cells, of_bias, mask=inside)


KERNELS = {
    "diagonal_forward": diagonal_forward,
    "diagonal_backward_input": diagonal_backward_input,
    "diagonal_backward_weight": diagonal_backward_weight,
}


def fused_forward(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Launches the forward kernel: y [B, o] of `trainer.ops.meta_linear`, inputs of one dtype."""
    (rows, width), rank = h.shape, g.shape[1]
    if rows * width == 0:
        return h.new_empty(h.shape)
    h, weight, bias = (padded(tensor, width) for tensor in (h, weight, bias))
    out = h.shape[1]
    y = torch.empty_like(h)
    tile, _ = choose_tile("diagonal_forward", h.element_size(), out, rank + 1)
    start(
        diagonal_forward,
        (triton.cdiv(rows, tile.bm), triton.cdiv(out, tile.bn)),
        (h, g.contiguous(), weight, bias, y, rows, rank, out),
        tile,
        ACTIVATION=ACTIVATION_CODES[activation],
    )
    return y[:, :width].contiguous()


def fused_backward(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both backward kernels.

    Args:
        dz: Gradient before the activation [B, o].
        h: Layer inputs [B, o].
        g: Knowledge vectors [B, r].
        weight: Diagonals [r+1, o].
        bias: Biases [r+1, o].

    Returns:
        dh [B, o], dg [B, r], dweight [r+1, o], dbias [r+1, o].
    """
    width = h.shape[1]
    if h.numel() == 0:
        dh, dg, dweight, dbias = (tensor.new_zeros(tensor.shape) for tensor in (h, g, weight, bias))
        return dh, dg, dweight, dbias
    dz, h, weight, bias = (padded(tensor, width) for tensor in (dz, h, weight, bias))
    g = g.contiguous()
    dh, dg = launch_backward_input(dz, h, g, weight, bias)
    dweight, dbias = launch_backward_weight(dz, h, g, weight)
    return (
        dh[:, :width].contiguous(),
        dg,
        dweight[:, :width].contiguous(),
        dbias[:, :width].contiguous(),
    )


def launch_backward_input(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dh [B, o] and dg [B, r]."""
    (rows, out), rank = h.shape, g.shape[1]
    tile, _ = choose_tile("diagonal_backward_input", h.element_size(), out, rank + 1)
    tiles = triton.cdiv(out, tile.bn)
    dh = torch.empty_like(h)
    dg = h.new_empty(tiles, rows, rank, dtype=torch.float32)
    start(
        diagonal_backward_input,
        (triton.cdiv(rows, tile.bm), tiles),
        (dz, h, g, weight, bias, dh, dg, rows, rank, out),
        tile,
    )
    return dh, dg.sum(0).to(g.dtype)


def launch_backward_weight(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dweight [r+1, o] and dbias [r+1, o]."""
    (rows, out), rank = h.shape, g.shape[1]
    tile, _ = choose_tile("diagonal_backward_weight", h.element_size(), out, 0)
    programs = triton.cdiv(out, tile.bn), triton.cdiv(rank + 1, _SLICES.value)
    processors = multiprocessors(h.device)
    share = share_of_batch(processors, programs[0] * programs[1], rows, max(out, rank), tile.bk)
    shares = triton.cdiv(rows, share)
    sums = [h.new_empty(shares, *weight.shape, dtype=torch.float32) for _ in range(2)]
    start(
        diagonal_backward_weight,
        (*programs, shares),
        (dz, h, g, *sums, rows, rank, out, share),
        tile,
    )
    dweight, dbias = (partial.sum(0).to(weight.dtype) for partial in sums)
    return dweight, dbias
