"""Triton kernels of the fused strategy, and their launchers. Needs `triton` to import.

Three kernels, float32 accumulation, every size masked, no atomics (two runs give the same bits):
- forward: h [BM, i] stays on chip, A_j streams by; acc += g_j * (h A_j^T). The scale is applied after
  the product, in float32: g_j h is neither stored nor rounded.
- backward to inputs: V_j = dz A_j serves both dh += g_j V_j and dg_j = <V_j, h> + <dz, c_j>.
- backward to weights: dA_j^T = h^T (g_j dz) over a share of the batch; a sum adds the shares up.
  Transposed, since then what is scaled is the operand that tensor cores read from shared memory: as the
  other one it would lie in registers, and the compiler waited for every product (ptxas C7515).
Where a batch has too few rows for a program on every multiprocessor, the first two go through a part of
the slices only, and a fourth kernel adds the parts up.
Neither [B, o, i] nor the product of g and h reaches memory. dz = dy act'(y) does, once, [B, o]: with
the activation inside the kernels its loads could not be pipelined into shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.ops.triton_tiles import (
    ACTIVATION_CODES,
    Tile,
    activate_tile,
    any_size,
    choose_tile,
    dot,
    multiprocessors,
    padded,
    share_of_batch,
    slices_of_a_part,
    start,
    transposed_gates,
)

_BIASES = tl.constexpr(32)  # applied in blocks of that many slices
_SUM = Tile(1, 1024, 1, 4, 1)  # of parts; bound by memory


@any_size
def meta_forward(
    h,
    gates,
    weight,
    bias,
    y,
    ROWS,
    RANK,
    IN,
    OUT,
    STRIDE,
    slices_per_part,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ONE_K: tl.constexpr,
):
    """One [BM, BN] tile of y [parts, ROWS, OUT], of a part of the slices; gates [RANK + 1, STRIDE].

    ONE_K: IN <= BK, so that h is loaded once for all slices.
    """
    first = tl.program_id(0).to(tl.int64) * BM
    part = tl.program_id(2)
    h += first * IN
    gates += first
    y += (part.to(tl.int64) * ROWS + first) * OUT
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_m, in_n = m < ROWS - first, n < OUT
    begin = part * slices_per_part
    end = tl.minimum(RANK + 1, begin + slices_per_part)
    acc = tl.zeros((BM, BN), tl.float32)
    for j0 in range(begin, end, _BIASES):
        j = j0 + tl.arange(0, _BIASES)
        c = tl.load(
            bias + j[:, None] * OUT + n[None, :], mask=(j < end)[:, None] & in_n[None, :], other=0.0
        )
        gate = tl.load(
            gates + j.to(tl.int64)[None, :] * STRIDE + m[:, None],
            mask=in_m[:, None] & (j < end)[None, :],
            other=0.0,
        )
        acc = dot(gate.to(c.dtype), c, acc, PRECISION)
    if ONE_K:
        x = tl.load(
            h + m[:, None] * IN + k[None, :], mask=in_m[:, None] & (k < IN)[None, :], other=0.0
        )
    for j in range(begin, end):
        slice_j = weight + tl.cast(j, tl.int64) * OUT * IN
        gate = tl.load(gates + tl.cast(j, tl.int64) * STRIDE + m, mask=in_m, other=0.0)
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
    gates,
    weight,
    bias,
    dh,
    dg,
    ROWS,
    RANK,
    IN,
    OUT,
    STRIDE,
    WIDTH,
    slices_per_part,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ONE_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One [BM, BN] tile of dh [parts, ROWS, IN] and its share of dg, float32 [tiles of IN + 1, RANK, ROWS].

    The last plane of dg is what the biases give. TAIL: some tile reaches beyond the WIDTH columns that
    h has; there V_j is 0 times dz, which is no number where dz is infinite.
    """
    first = tl.program_id(0).to(tl.int64) * BM
    part = tl.program_id(2)
    dz += first * OUT
    h += first * IN
    gates += first
    dg += first
    dh += (part.to(tl.int64) * ROWS + first) * IN
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_m, in_n = m < ROWS - first, n < IN
    inside = in_m[:, None] & in_n[None, :]
    begin = part * slices_per_part
    end = tl.minimum(RANK + 1, begin + slices_per_part)
    if ONE_K:
        d = tl.load(
            dz + m[:, None] * OUT + k[None, :], mask=in_m[:, None] & (k < OUT)[None, :], other=0.0
        )
    if tl.program_id(1) == 0:
        of_bias = dg + tl.num_programs(1).to(tl.int64) * RANK * ROWS
        # Not pipelined: a ring for these few loads would take the main loop's shared memory.
        for j0 in tl.range(begin, end, _BIASES, num_stages=1):
            j = j0 + tl.arange(0, _BIASES)
            in_j = j < tl.minimum(end, RANK)
            share = tl.zeros((BM, _BIASES), tl.float32)
            if ONE_K:
                c = tl.load(
                    bias + j[None, :] * OUT + k[:, None],
                    mask=in_j[None, :] & (k < OUT)[:, None],
                    other=0.0,
                )
                share = dot(d, c, share, PRECISION)
            else:
                for k0 in tl.range(0, OUT, BK, num_stages=1):
                    in_k = k < OUT - k0
                    c = tl.load(
                        bias + j[None, :] * OUT + k0 + k[:, None],
                        mask=in_j[None, :] & in_k[:, None],
                        other=0.0,
                    )
                    dk = tl.load(
                        dz + m[:, None] * OUT + k0 + k[None, :],
                        mask=in_m[:, None] & in_k[None, :],
                        other=0.0,
                    )
                    share = dot(dk, c, share, PRECISION)
            tl.store(
                of_bias + j.to(tl.int64)[None, :] * ROWS + m[:, None],
                share,
                mask=in_m[:, None] & in_j[None, :],
            )
    dg += tl.program_id(1).to(tl.int64) * RANK * ROWS
    x = tl.load(h + m[:, None] * IN + n[None, :], mask=inside, other=0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    for j in range(begin, end):
        slice_j = weight + tl.cast(j, tl.int64) * OUT * IN
        gate = tl.load(gates + tl.cast(j, tl.int64) * STRIDE + m, mask=in_m, other=0.0)
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
        product = v * x.to(tl.float32)
        if TAIL:
            product = tl.where((n < WIDTH)[None, :], product, 0.0)
        share = tl.sum(product, axis=1)
        tl.store(dg + tl.cast(j, tl.int64) * ROWS + m, share, mask=in_m & (j < RANK))
    tl.store(dh + m[:, None] * IN + n[None, :], acc.to(dh.dtype.element_ty), mask=inside)


@any_size
def meta_backward_weight(
    dz,
    h,
    gates,
    dweight,
    ROWS,
    RANK,
    IN,
    OUT,
    STRIDE,
    rows_per_share,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """[BM, BN] tiles of dA_j of SLICES slices, one or two, over one share of the batch.

    dweight [shares, RANK + 1, OUT, IN]. Two slices read h and dz once.
    """
    tiles_n = tl.cdiv(IN, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    j = tl.program_id(1) * SLICES
    share = tl.program_id(2).to(tl.int64)
    first = share * rows_per_share
    dz += first * OUT
    h += first * IN
    gates += j.to(tl.int64) * STRIDE + first
    has_next = j < RANK
    next_gates = gates + tl.where(has_next, STRIDE, 0)
    rows = tl.minimum(ROWS - first, rows_per_share).to(tl.int32)
    k = tl.arange(0, BK)
    in_m, in_n = m < OUT, n < IN
    acc = tl.zeros((BN, BM), tl.float32)
    next_acc = tl.zeros((BN, BM), tl.float32)
    for k0 in range(0, rows, BK):
        b = k0 + k
        in_k = b < rows
        d = tl.load(
            dz + b[:, None] * OUT + m[None, :], mask=in_k[:, None] & in_m[None, :], other=0.0
        )
        x = tl.load(h + b[:, None] * IN + n[None, :], mask=in_k[:, None] & in_n[None, :], other=0.0)
        gate = tl.load(gates + b, mask=in_k, other=0.0)
        scaled = (gate[:, None] * d.to(tl.float32)).to(x.dtype)
        acc = dot(tl.trans(x), scaled, acc, PRECISION)
        if SLICES == 2:
            gate = tl.load(next_gates + b, mask=in_k, other=0.0)
            scaled = (gate[:, None] * d.to(tl.float32)).to(x.dtype)
            next_acc = dot(tl.trans(x), scaled, next_acc, PRECISION)
    dweight += (share * (RANK + 1) + j) * OUT * IN
    to = dweight + m[None, :] * IN + n[:, None]
    inside = in_m[None, :] & in_n[:, None]
    tl.store(to, acc.to(dweight.dtype.element_ty), mask=inside)
    if SLICES == 2:
        gradient = next_acc.to(dweight.dtype.element_ty)
        tl.store(to + OUT * IN, gradient, mask=inside & has_next)


@any_size
def meta_sum(partial, y, SIZE, parts, ACTIVATION: tl.constexpr, BN: tl.constexpr):
    """BN numbers of y [SIZE]: the sum over partial, float32 [parts, SIZE], in order, and an activation."""
    first = tl.program_id(0).to(tl.int64) * BN
    n = tl.arange(0, BN)
    inside = n < SIZE - first
    acc = tl.zeros((BN,), tl.float32)
    for part in range(0, parts):
        cells = partial + tl.cast(part, tl.int64) * SIZE + first + n
        acc += tl.load(cells, mask=inside, other=0.0)
    total = activate_tile(acc, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + first + n, total, mask=inside)


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
    gates = transposed_gates(g)
    i, o = h.shape[1], weight.shape[1]
    tile, one_k = choose_tile("forward", h.element_size(), o, i)
    programs = triton.cdiv(rows, tile.bm), triton.cdiv(o, tile.bn)
    per_part = slices_of_a_part(multiprocessors(h.device), programs[0] * programs[1], rank + 1)
    parts = triton.cdiv(rank + 1, per_part)
    y = h.new_empty(parts, rows, o, dtype=h.dtype if parts == 1 else torch.float32)
    start(
        meta_forward,
        (*programs, parts),
        (h, gates, weight, bias, y, rows, rank, i, o, gates.shape[1], per_part),
        tile,
        one_k,
        ACTIVATION=ACTIVATION_CODES[activation if parts == 1 else "none"],
    )
    return _sum(y, h.dtype, activation)[:, :width_out].contiguous()


def fused_backward(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches both backward kernels; the gradient of the biases is small and left to PyTorch.

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
    dbias = bias.new_empty(bias.shape)
    torch.mm(g.t(), dz, out=dbias[:-1])
    torch.sum(dz, 0, out=dbias[-1])
    if rows * width_in * width_out == 0:
        dh, dweight = h.new_zeros(h.shape), weight.new_zeros(weight.shape)
        return dh, dz @ bias[:-1].t(), dweight, dbias
    dz, h, gates = padded(dz, width_out), padded(h, width_in), transposed_gates(g)
    weight, bias = padded(weight, width_in, width_out), padded(bias, width_out)
    dh, dg = launch_backward_input(dz, h, gates, weight, bias, width_in)
    dweight = launch_backward_weight(dz, h, gates, weight)
    return (
        dh[:, :width_in].contiguous(),
        dg.t().to(g.dtype).contiguous(),
        dweight[:, :width_out, :width_in].contiguous(),
        dbias,
    )


def launch_backward_input(
    dz: Tensor, h: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, width_in: int
) -> tuple[Tensor, Tensor]:
    """Returns dh [B, i] and dg, float32 [r, B]; `width_in` are the columns of h that are no padding."""
    (rows, i), rank, o = h.shape, len(weight) - 1, dz.shape[1]
    tile, one_k = choose_tile("backward_input", h.element_size(), i, o)
    programs = triton.cdiv(rows, tile.bm), triton.cdiv(i, tile.bn)
    per_part = slices_of_a_part(multiprocessors(h.device), programs[0] * programs[1], rank + 1)
    parts = triton.cdiv(rank + 1, per_part)
    dh = h.new_empty(parts, rows, i, dtype=h.dtype if parts == 1 else torch.float32)
    dg = h.new_empty(programs[1] + 1, rank, rows, dtype=torch.float32)
    sizes = (rows, rank, i, o, gates.shape[1], width_in, per_part)
    start(
        meta_backward_input,
        (*programs, parts),
        (dz, h, gates, weight, bias, dh, dg, *sizes),
        tile,
        one_k,
        TAIL=width_in % tile.bn != 0,
    )
    return _sum(dh, h.dtype), dg.sum(0)


def launch_backward_weight(dz: Tensor, h: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    """Returns dweight [r+1, o, i]."""
    (rows, i), rank, o = h.shape, len(weight) - 1, dz.shape[1]
    tile, _ = choose_tile("backward_weight", h.element_size(), i, 0)
    programs = (
        triton.cdiv(o, tile.bm) * triton.cdiv(i, tile.bn),
        triton.cdiv(rank + 1, tile.slices),
    )
    processors = multiprocessors(h.device)
    share = share_of_batch(processors, programs[0] * programs[1], rows, max(i, o), tile.bk)
    shares = triton.cdiv(rows, share)
    dtype = weight.dtype if shares == 1 else torch.float32
    sums = h.new_empty(shares, *weight.shape, dtype=dtype)
    start(
        meta_backward_weight,
        (*programs, shares),
        (dz, h, gates, sums, rows, rank, i, o, gates.shape[1], share),
        tile,
    )
    return _sum(sums, weight.dtype)


def _sum(partial: Tensor, dtype: torch.dtype, activation: str = "none") -> Tensor:
    """The sum over the first dimension; of one part, which is what it shall be already, itself."""
    if len(partial) == 1:
        return partial[0]
    total = partial.new_empty(partial.shape[1:], dtype=dtype)
    start(
        meta_sum,
        (triton.cdiv(total.numel(), _SUM.bn),),
        (partial, total, total.numel(), len(partial)),
        _SUM,
        ACTIVATION=ACTIVATION_CODES[activation],
    )
    return total
