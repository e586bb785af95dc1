"""Triton kernels of the fused strategy, and their launchers. Needs `triton` to import.

Three kernels, float32 accumulation, every size masked, no atomics (two runs give the same bits):
- forward: h [BM, i] stays on chip, A_j streams by; acc += g_j * (h A_j^T). The scale is applied after
  the product, in float32: g_j h is neither stored nor rounded.
- backward to inputs: V_j = dz A_j serves both dh += g_j V_j and dg_j = <V_j, h>.
- backward to weights: dA_j = (g_j dz)^T h over a share of the batch; the host adds the shares up.
Neither [B, o, i] nor the product of g and h reaches memory. dz = dy act'(y) does, once, [B, o]: with
the activation inside the kernels its loads could not be pipelined into shared memory.
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

_BIASES = tl.constexpr(32)  # applied in blocks of that many slices


@any_size
def meta_forward(
    h,
    g,
    weight,
    bias,
    y,
    ROWS,
    RANK,
    IN,
    OUT,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ONE_K: tl.constexpr,
):
    """One [BM, BN] tile of y [ROWS, OUT]. ONE_K: IN <= BK, so that h is loaded once for all slices."""
    first = tl.program_id(0).to(tl.int64) * BM
    h += first * IN
    g += first * RANK
    y += first * OUT
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_m, in_n = m < ROWS - first, n < OUT
    acc = tl.zeros((BM, BN), tl.float32)
    for j0 in range(0, RANK + 1, _BIASES):
        j = j0 + tl.arange(0, _BIASES)
        c = load_slices(bias, j, n, in_n, RANK, OUT)
        acc = dot(load_gates(g, m, in_m, j, RANK), c, acc, PRECISION)
    if ONE_K:
        x = tl.load(
            h + m[:, None] * IN + k[None, :], mask=in_m[:, None] & (k < IN)[None, :], other=0.0
        )
    for j in range(0, RANK + 1):
        slice_j = weight + tl.cast(j, tl.int64) * OUT * IN
        gate = tl.load(g + m * RANK + j, mask=in_m & (j < RANK), other=1.0).to(tl.float32)
        u = tl.zeros((BM, BN), tl.float32)
        if ONE_K:
            a = tl.load(
                slice_j + n[None, :] * IN + k[:, None],
                mask=in_n[None, :] & (k < IN)[:, None],
                other=0.0,
            )
            u = dot(x, a, u, PRECISION)
        else:
            for k0 in range(0, IN, BK):
                in_k = k < IN - k0
                xk = tl.load(
                    h + m[:, None] * IN + k0 + k[None, :],
                    mask=in_m[:, None] & in_k[None, :],
                    other=0.0,
                )
                a = tl.load(
                    slice_j + n[None, :] * IN + k0 + k[:, None],
                    mask=in_n[None, :] & in_k[:, None],
                    other=0.0,
                )
                u = dot(xk, a, u, PRECISION)
        acc += gate[:, None] * u
    acc = activate_tile(acc, ACTIVATION)
    tl.store(
        y + m[:, None] * OUT + n[None, :],
        acc.to(y.dtype.element_ty),
        mask=in_m[:, None] & in_n[None, :],
    )


@any_size
def meta_backward_input(
    dz,
    h,
    g,
    weight,
    dh,
    dg,
    ROWS,
    RANK,
    IN,
    OUT,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ONE_K: tl.constexpr,
):
    """One [BM, BN] tile of dh [ROWS, IN], and its share of dg, float32 [tiles of IN, RANK, ROWS]."""
    first = tl.program_id(0).to(tl.int64) * BM
    dz += first * OUT
    h += first * IN
    g += first * RANK
    dh += first * IN
    dg += tl.program_id(1).to(tl.int64) * RANK * ROWS + first
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_m, in_n = m < ROWS - first, n < IN
    inside = in_m[:, None] & in_n[None, :]
    x = tl.load(h + m[:, None] * IN + n[None, :], mask=inside, other=0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    if ONE_K:
        d = tl.load(
            dz + m[:, None] * OUT + k[None, :], mask=in_m[:, None] & (k < OUT)[None, :], other=0.0
        )
    for j in range(0, RANK + 1):
        slice_j = weight + tl.cast(j, tl.int64) * OUT * IN
        gate = tl.load(g + m * RANK + j, mask=in_m & (j < RANK), other=1.0).to(tl.float32)
        v = tl.zeros((BM, BN), tl.float32)
        if ONE_K:
            a = tl.load(
                slice_j + k[:, None] * IN + n[None, :],
                mask=(k < OUT)[:, None] & in_n[None, :],
                other=0.0,
            )
            v = dot(d, a, v, PRECISION)
        else:
            for k0 in range(0, OUT, BK):
                in_k = k < OUT - k0
                dk = tl.load(
                    dz + m[:, None] * OUT + k0 + k[None, :],
                    mask=in_m[:, None] & in_k[None, :],
                    other=0.0,
                )
                a = tl.load(
                    slice_j + (k0 + k)[:, None] * IN + n[None, :],
                    mask=in_k[:, None] & in_n[None, :],
                    other=0.0,
                )
                v = dot(dk, a, v, PRECISION)
        acc += gate[:, None] * v
        share = tl.sum(v * x.to(tl.float32), axis=1)
        tl.store(dg + tl.cast(j, tl.int64) * ROWS + m, share, mask=in_m & (j < RANK))
    tl.store(dh + m[:, None] * IN + n[None, :], acc.to(dh.dtype.element_ty), mask=inside)


@any_size
def meta_backward_weight(
    dz,
    h,
    g,
    dweight,
    ROWS,
    RANK,
    IN,
    OUT,
    rows_per_share,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of dA_j over one share of the batch; dweight [shares, RANK+1, OUT, IN]."""
    tiles_n = tl.cdiv(IN, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    j = tl.program_id(1)
    share = tl.program_id(2).to(tl.int64)
    first = share * rows_per_share
    dz += first * OUT
    h += first * IN
    g += first * RANK
    rows = tl.minimum(ROWS - first, rows_per_share).to(tl.int32)
    k = tl.arange(0, BK)
    in_m, in_n = m < OUT, n < IN
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, rows, BK):
        in_k = k < rows - k0
        b = k0 + k
        d = tl.load(
            dz + b[:, None] * OUT + m[None, :], mask=in_k[:, None] & in_m[None, :], other=0.0
        )
        gate = tl.load(g + b * RANK + j, mask=in_k & (j < RANK), other=1.0).to(tl.float32)
        x = tl.load(h + b[:, None] * IN + n[None, :], mask=in_k[:, None] & in_n[None, :], other=0.0)
        scaled = (gate[:, None] * d.to(tl.float32)).to(x.dtype)
        acc = dot(tl.trans(scaled), x, acc, PRECISION)
    dweight += (share * (RANK + 1) + j) * OUT * IN
    tl.store(
        dweight + m[:, None] * IN + n[None, :],
        acc.to(dweight.dtype.element_ty),
        mask=in_m[:, None] & in_n[None, :],
    )


KERNELS = {
    "forward": meta_forward,
    "backward_input": meta_backward_input,
    "backward_weight": meta_backward_weight,
}


def fused_forward(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Launches the forward kernel: gives y [B, o] of `trainer.ops.meta_linear`, inputs of one dtype."""
    (rows, width_in), rank, width_out = h.shape, g.shape[1], weight.shape[1]
    if rows * width_out == 0:
        return h.new_empty(rows, width_out)
    h, weight, bias = (
        padded(h, width_in),
        padded(weight, width_in, width_out),
        padded(bias, width_out),
    )
    i, o = h.shape[1], weight.shape[1]
    y = h.new_empty(rows, o)
    tile, one_k = choose_tile("forward", h.element_size(), o, i)
    start(
        meta_forward,
        (triton.cdiv(rows, tile.bm), triton.cdiv(o, tile.bn)),
        (h, g.contiguous(), weight, bias, y, rows, rank, i, o),
        tile,
        one_k,
        ACTIVATION=ACTIVATION_CODES[activation],
    )
    return y[:, :width_out].contiguous()


def fused_backward(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both backward kernels; what concerns the biases alone is small and left to PyTorch.

    Args:
        dz: Gradient before the activation [B, o].
        h: Layer inputs [B, i].
        g: Knowledge vectors [B, r].
        weight: Slices [r+1, o, i].
        bias: Biases [r+1, o].

    Returns:
        dh [B, i], dg [B, r], dweight [r+1, o, i], dbias [r+1, o].
    """
    (rows, width_in), width_out = h.shape, weight.shape[1]
    dbias = torch.cat([g.t() @ dz, dz.sum(0, keepdim=True)])
    dg_of_bias = dz @ bias[:-1].t()
    if rows * width_in * width_out == 0:
        dh, dweight = h.new_zeros(h.shape), weight.new_zeros(weight.shape)
        return dh, dg_of_bias, dweight, dbias
    dz, h, g = padded(dz, width_out), padded(h, width_in), g.contiguous()
    weight = padded(weight, width_in, width_out)
    dh, dg = launch_backward_input(dz, h, g, weight)
    dweight = launch_backward_weight(dz, h, g, weight)
    return (
        dh[:, :width_in].contiguous(),
        (dg.t() + dg_of_bias).to(g.dtype).contiguous(),
        dweight[:, :width_out, :width_in].contiguous(),
        dbias,
    )


def launch_backward_input(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dh [B, i] and, float32 [r, B], the inner products <V_j, h>."""
    (rows, i), rank, o = h.shape, g.shape[1], dz.shape[1]
    tile, one_k = choose_tile("backward_input", h.element_size(), i, o)
    tiles = triton.cdiv(i, tile.bn)
    dh = torch.empty_like(h)
    dg = h.new_empty(tiles, rank, rows, dtype=torch.float32)
    start(
        meta_backward_input,
        (triton.cdiv(rows, tile.bm), tiles),
        (dz, h, g, weight, dh, dg, rows, rank, i, o),
        tile,
        one_k,
    )
    return dh, dg.sum(0)


def launch_backward_weight(dz: Tensor, h: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Returns dweight [r+1, o, i]."""
    (rows, i), rank, o = h.shape, g.shape[1], dz.shape[1]
    tile, _ = choose_tile("backward_weight", h.element_size(), i, 0)
    tiles = triton.cdiv(o, tile.bm) * triton.cdiv(i, tile.bn)
    processors, programs = multiprocessors(h.device), tiles * (rank + 1)
    share = share_of_batch(processors, programs, rows, max(i, o, rank), tile.bk)
    shares = triton.cdiv(rows, share)
    dtype = weight.dtype if shares == 1 else torch.float32
    sums = h.new_empty(shares, *weight.shape, dtype=dtype)
    start(
        meta_backward_weight,
        (tiles, rank + 1, shares),
        (dz, h, g, sums, rows, rank, i, o, share),
        tile,
    )
    return sums[0] if shares == 1 else sums.sum(0).to(weight.dtype)
