"""Triton kernels of the fused strategy, their tile table and their launchers. Needs `triton` to import.

Three kernels, float32 accumulation, every size masked, no atomics (two runs give the same bits):
- forward: h [BM, i] stays on chip, A_j streams by; acc += g_j * (h A_j^T). The scale is applied after
  the product, in float32: g_j h is neither stored nor rounded.
- backward to inputs: V_j = dz A_j serves both dh += g_j V_j and dg_j = <V_j, h>.
- backward to weights: dA_j = (g_j dz)^T h over a share of the batch; the host adds the shares up.
Neither [B, o, i] nor the product of g and h reaches memory. dz = dy act'(y) does, once, [B, o]: with
the activation inside the kernels its loads could not be pipelined into shared memory.

Under TRITON_INTERPRET=1 (set before the import) the same kernels run on CPU tensors, which is how they
are tested without a GPU.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The interpreter multiplies bfloat16 operands of a dot as if their bits were integers.
_WIDEN = tl.constexpr(INTERPRETING)
_GATES = tl.constexpr(32)  # biases are applied in blocks of that many slices

# One compiled variant for every batch size and rank. Widths are padded to a multiple of 16 by the
# launchers: loads that cannot be vectorised cost so many registers that the tiles would spill.
_kernel = triton.jit(
    do_not_specialize=["ROWS", "RANK", "rows_per_share"], do_not_specialize_on_alignment=["g"]
)
ACTIVATION_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "sigmoid": 3, "tanh": 4}


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:  # not the plain maximum, which on a GPU makes 0 of what is not a number
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        z = tl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == 3:
        z = tl.sigmoid(z)
    elif ACTIVATION == 4:  # near 0, where the difference would cancel, by its series
        x = z * z
        series = 2 / 15 + x * (-17 / 315 + x * (62 / 2835))
        series = z * (1 + x * (-1 / 3 + x * series))
        z = tl.where(tl.abs(z) < 0.25, series, 2.0 * tl.sigmoid(2.0 * z) - 1.0)
    return z


@_kernel
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
    for j0 in range(0, RANK + 1, _GATES):
        j = j0 + tl.arange(0, _GATES)
        gates = tl.load(
            g + m[:, None] * RANK + j[None, :], mask=in_m[:, None] & (j < RANK)[None, :], other=0.0
        )
        ones = tl.where(j == RANK, 1.0, 0.0).to(gates.dtype)
        c = tl.load(
            bias + j[:, None] * OUT + n[None, :],
            mask=(j <= RANK)[:, None] & in_n[None, :],
            other=0.0,
        )
        acc = _dot(gates + ones[None, :], c, acc, PRECISION)
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
            u = _dot(x, a, u, PRECISION)
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
                u = _dot(xk, a, u, PRECISION)
        acc += gate[:, None] * u
    acc = _activate(acc, ACTIVATION)
    tl.store(
        y + m[:, None] * OUT + n[None, :],
        acc.to(y.dtype.element_ty),
        mask=in_m[:, None] & in_n[None, :],
    )


@_kernel
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
            v = _dot(d, a, v, PRECISION)
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
                v = _dot(dk, a, v, PRECISION)
        acc += gate[:, None] * v
        share = tl.sum(v * x.to(tl.float32), axis=1)
        tl.store(dg + tl.cast(j, tl.int64) * ROWS + m, share, mask=in_m & (j < RANK))
    tl.store(dh + m[:, None] * IN + n[None, :], acc.to(dh.dtype.element_ty), mask=inside)


@_kernel
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
        acc = _dot(tl.trans(scaled), x, acc, PRECISION)
    dweight += (share * (RANK + 1) + j) * OUT * IN
    tl.store(
        dweight + m[:, None] * IN + n[None, :],
        acc.to(dweight.dtype.element_ty),
        mask=in_m[:, None] & in_n[None, :],
    )


@dataclass(frozen=True)
class Tile:
    """Block sizes (rows, columns, depth of the product), warps and pipeline stages of a program."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """The block sizes as the kernels name them."""
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk}


# (kernel, bytes per element, most columns, most depth) -> tile; None = any. The first that fits is
# taken. Depth within the limit means that the resident operand is loaded once (ONE_K). Chosen by
# registers, spills and shared memory as compiled for sm_80 and sm_90 (tests/test_triton_resources.py
# holds every line to them); NOT by time on a GPU, which nobody has measured yet.
TILES: list[tuple[str, int, int | None, int | None, Tile]] = [
    ("forward", 2, 32, 64, Tile(64, 32, 64, 4, 3)),
    ("forward", 2, None, 64, Tile(128, 64, 64, 8, 3)),
    ("forward", 2, None, 128, Tile(128, 64, 128, 8, 2)),
    ("forward", 2, None, None, Tile(128, 128, 64, 8, 3)),
    ("forward", 4, None, 64, Tile(64, 32, 64, 4, 2)),
    ("forward", 4, None, None, Tile(64, 32, 32, 4, 3)),
    ("backward_input", 2, 32, 64, Tile(64, 32, 64, 4, 3)),
    ("backward_input", 2, None, 64, Tile(64, 64, 64, 4, 3)),
    ("backward_input", 2, None, 128, Tile(64, 64, 128, 4, 2)),
    ("backward_input", 2, None, None, Tile(64, 128, 64, 8, 3)),
    ("backward_input", 4, None, 64, Tile(64, 32, 64, 8, 2)),
    ("backward_input", 4, None, None, Tile(64, 32, 32, 8, 3)),
    ("backward_weight", 2, 64, None, Tile(64, 64, 64, 4, 3)),
    ("backward_weight", 2, None, None, Tile(128, 128, 64, 8, 2)),
    ("backward_weight", 4, None, None, Tile(64, 64, 32, 4, 2)),
]
KERNELS = {
    "forward": meta_forward,
    "backward_input": meta_backward_input,
    "backward_weight": meta_backward_weight,
}


def choose_tile(kernel: str, itemsize: int, columns: int, depth: int) -> tuple[Tile, bool]:
    """The tile for a kernel ("forward", "backward_input", "backward_weight").

    Args:
        kernel: Which of the three.
        itemsize: Bytes per element of the inputs, 2 or 4.
        columns: Width of the kernel's output.
        depth: Length of its inner products (of no account for the weights' kernel: the batch).

    Returns:
        The tile, and whether the whole depth fits into one block.
    """
    for name, size, most_columns, most_depth, tile in TILES:
        fits = (most_columns is None or columns <= most_columns) and (
            most_depth is None or depth <= most_depth
        )
        if name == kernel and size == itemsize and fits:
            return tile, most_depth is not None
    raise ValueError(f"no tile for kernel {kernel!r} with elements of {itemsize} bytes")


def constants(kernel: str, tile: Tile, one_k: bool, precision: str) -> dict[str, Any]:
    """The compile-time constants of a kernel but for the activation (forward only)."""
    values: dict[str, Any] = {"PRECISION": precision, **tile.sizes()}
    return values if kernel == "backward_weight" else values | {"ONE_K": one_k}


def variants() -> Iterator[tuple[str, Tile, dict[str, Any], str, str]]:
    """Every shipped variant: kernel, tile, constants, Triton's names of the types read and written."""
    for kernel, itemsize, _, most_depth, tile in TILES:
        kinds = [("bf16", "tf32"), ("fp16", "tf32")]
        if itemsize == 4:
            kinds = [("fp32", "tf32"), ("fp32", "tf32x3")]
        for element, precision in kinds:
            values = constants(kernel, tile, most_depth is not None, precision)
            if kernel == "forward":
                for code in ACTIVATION_CODES.values():
                    yield kernel, tile, values | {"ACTIVATION": code}, element, element
                continue
            yield kernel, tile, values, element, element
            if kernel == "backward_weight" and itemsize == 2:  # several shares: sums in float32
                yield kernel, tile, values, element, "fp32"


def _precision(dtype: torch.dtype) -> str:
    # float32 on tensor cores: three products make up for TF32's short mantissa, unless the user
    # traded precision for speed for every other product as well. Asked by the name that torch has had
    # since 2.9: the older one, `allow_tf32`, raises where a user has set the newer.
    matmul = torch.backends.cuda.matmul
    is_fast = dtype != torch.float32 or matmul.fp32_precision == "tf32"
    return "tf32" if is_fast else "tf32x3"


def _padded(one: Tensor, *widths: int) -> Tensor:
    """Its last dimensions filled up with zeros to multiples of 16; contiguous, aligned to 16 bytes."""
    extra: list[int] = []
    for width in widths:
        extra += [0, -width % 16]
    one = F.pad(one, extra) if any(extra) else one.contiguous()
    return one.clone() if one.data_ptr() % 16 else one


def fused_forward(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Launches the forward kernel: gives y [B, o] of `trainer.ops.meta_linear`, inputs of one dtype."""
    (rows, width_in), rank, width_out = h.shape, g.shape[1], weight.shape[1]
    if rows * width_out == 0:
        return h.new_empty(rows, width_out)
    h, weight, bias = (
        _padded(h, width_in),
        _padded(weight, width_in, width_out),
        _padded(bias, width_out),
    )
    i, o = h.shape[1], weight.shape[1]
    y = h.new_empty(rows, o)
    tile, one_k = choose_tile("forward", h.element_size(), o, i)
    meta_forward[(triton.cdiv(rows, tile.bm), triton.cdiv(o, tile.bn))](
        *(h, g.contiguous(), weight, bias, y, rows, rank, i, o),
        ACTIVATION=ACTIVATION_CODES[activation],
        num_warps=tile.warps,
        num_stages=tile.stages,
        **constants("forward", tile, one_k, _precision(h.dtype)),
    )
    return y[:, :width_out].contiguous()


def _rows_per_share(processors: int, programs: int, rows: int, widest: int, block: int) -> int:
    """Rows of a part of the batch that the weights' kernel sums apart, a multiple of `block`.

    Parts are made so that every multiprocessor has work, and so that what they read of the widest input
    is numbered by 32 bits.
    """
    shares = max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(rows, 512)))
    wanted = triton.cdiv(triton.cdiv(rows, shares), block) * block
    return min(wanted, 2**31 // widest // block * block)


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
        return torch.zeros_like(h), dg_of_bias, torch.zeros_like(weight), dbias
    dz, h, g = _padded(dz, width_out), _padded(h, width_in), g.contiguous()
    weight = _padded(weight, width_in, width_out)
    dh, dg = _launch_backward_input(dz, h, g, weight)
    dweight = _launch_backward_weight(dz, h, g, weight)
    return (
        dh[:, :width_in].contiguous(),
        (dg.t() + dg_of_bias).to(g.dtype).contiguous(),
        dweight[:, :width_out, :width_in].contiguous(),
        dbias,
    )


def _launch_backward_input(
    dz: Tensor, h: Tensor, g: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dh [B, i] and, float32 [r, B], the inner products <V_j, h>."""
    (rows, i), rank, o = h.shape, g.shape[1], dz.shape[1]
    tile, one_k = choose_tile("backward_input", h.element_size(), i, o)
    tiles = triton.cdiv(i, tile.bn)
    dh = torch.empty_like(h)
    dg = h.new_empty(tiles, rank, rows, dtype=torch.float32)
    meta_backward_input[(triton.cdiv(rows, tile.bm), tiles)](
        *(dz, h, g, weight, dh, dg, rows, rank, i, o),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **constants("backward_input", tile, one_k, _precision(h.dtype)),
    )
    return dh, dg.sum(0)


def _launch_backward_weight(dz: Tensor, h: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Returns dweight [r+1, o, i]."""
    (rows, i), rank, o = h.shape, g.shape[1], dz.shape[1]
    tile, _ = choose_tile("backward_weight", h.element_size(), i, 0)
    tiles = triton.cdiv(o, tile.bm) * triton.cdiv(i, tile.bn)
    processors = (
        torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 4
    )
    programs = tiles * (rank + 1)
    rows_per_share = _rows_per_share(processors, programs, rows, max(i, o, rank), tile.bk)
    shares = triton.cdiv(rows, rows_per_share)
    dtype = weight.dtype if shares == 1 else torch.float32
    sums = h.new_empty(shares, *weight.shape, dtype=dtype)
    meta_backward_weight[(tiles, rank + 1, shares)](
        *(dz, h, g, sums, rows, rank, i, o, rows_per_share),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **constants("backward_weight", tile, True, _precision(h.dtype)),
    )
    return sums[0] if shares == 1 else sums.sum(0).to(weight.dtype)
