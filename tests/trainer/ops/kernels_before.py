"""A kernel as it was, which the gates of test_triton_resources.py have to refuse."""

import triton.language as tl

from trainer.ops.triton_tiles import any_size, dot


@any_size
def weight_by_register(
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
    """dA_j = (g_j dz)^T h. What is scaled is the left operand, in registers: the assembler serialises."""
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
