"""Warp-specialised kernels for Hopper in Gluon. Compiled, never run: see `trainer.ops.experimental`.

A program has one producer warp, which copies by TMA, and two consumer warpgroups of 64 rows each. What
stays for all slices, h or dz, is copied once. Blocks of slices go through a ring in shared memory. Each of
its cells has two mbarriers: on `full` the copy's bytes arrive, on `empty` both consumers. The warpgroups
take turns by themselves: while one scales, the other multiplies. Scales are applied after the product, in
float32, as by the kernels of `trainer.ops.triton_meta`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Not specialised on values: one compiled variant for every batch size and rank.
any_size = gluon.jit(do_not_specialize=["ROWS", "RANK"])


@gluon.jit
def activate_tile(z, ACTIVATION: gl.constexpr):
    """One of `trainer.ops.triton_tiles.ACTIVATION_CODES`, of a float32 tile."""
    if ACTIVATION == 1:  # what is not a number is not below 0, and stays
        z = gl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = gl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == 3:
        z = 1.0 / (1.0 + gl.exp(-z))
    elif ACTIVATION == 4:  # near 0, where the difference would cancel, by its series
        x = z * z
        series = 2 / 15 + x * (-17 / 315 + x * (62 / 2835))
        series = z * (1 + x * (-1 / 3 + x * series))
        z = gl.where(gl.abs(z) < 0.25, series, 2.0 / (1.0 + gl.exp(-2.0 * z)) - 1.0)
    return z


@gluon.jit
def produce(
    rows_desc,
    slices_desc,
    shared,
    first_row,
    first_column,
    SLICES,
    OUT,
    BK: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    FORWARD: gl.constexpr,
):
    """Copies both consumers' rows, then blocks of A_0 to A_r, in steps along the depth.

    A block is [columns, BK] of A_j in the forward pass, and [BK, columns] in the backward pass.
    """
    resident, ring, resident_full, full, empty = shared
    mbarrier.expect(resident_full, rows_desc.block_type.nbytes * STEPS * 2)
    for consumer in gl.static_range(2):
        for step in gl.static_range(STEPS):
            tma.async_copy_global_to_shared(
                rows_desc,
                [first_row + 64 * consumer, step * BK],
                resident_full,
                resident.index(consumer * STEPS + step),
            )
    for block in range(SLICES * STEPS):
        cell = block % STAGES
        mbarrier.wait(empty.index(cell), ((block // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(cell), slices_desc.block_type.nbytes)
        slice_row = block // STEPS * OUT
        depth = block % STEPS * BK
        row = slice_row + (first_column if FORWARD else depth)
        column = depth if FORWARD else first_column
        tma.async_copy_global_to_shared(
            slices_desc, [row, column], full.index(cell), ring.index(cell)
        )


@gluon.jit
def multiply(
    CONSUMER: gl.constexpr,
    product,
    shared,
    j,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    FORWARD: gl.constexpr,
):
    """The product of a consumer's rows by slice j, float32 [64, columns]; frees the ring's cells."""
    resident, ring, _, full, empty = shared
    for step in gl.static_range(STEPS):
        block = j * STEPS + step
        cell = block % STAGES
        mbarrier.wait(full.index(cell), (block // STAGES) & 1)
        a = ring.index(cell)
        if FORWARD:
            a = a.permute((1, 0))
        rows = resident.index(CONSUMER * STEPS + step)
        product = warpgroup_mma(rows, a, product, use_acc=step > 0, is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    for step in gl.static_range(STEPS):
        mbarrier.arrive(empty.index((j * STEPS + step) % STAGES), count=1)
    return product


@gluon.jit
def consume_forward(
    CONSUMER: gl.constexpr,
    shared,
    inputs,
    ACTIVATION: gl.constexpr,
    BN: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A [64, BN] tile of y: the sum of g~_j (h A_j^T + c_j), and the activation."""
    gates, bias, y, first_row, first_column, SLICES, ROWS, OUT, STRIDE = inputs
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    m = first_row + 64 * CONSUMER + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    n = first_column + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
    acc = gl.zeros([64, BN], gl.float32, LAYOUT)
    product = gl.zeros([64, BN], gl.float32, LAYOUT)
    mbarrier.wait(shared[2], 0)
    for j in range(SLICES):
        gate = gl.load(gates + gl.cast(j, gl.int64) * STRIDE + m, mask=m < ROWS, other=0.0)
        c = gl.load(bias + j * OUT + n, mask=n < OUT, other=0.0).to(gl.float32)
        product = multiply(CONSUMER, product, shared, j, STEPS, STAGES, FORWARD=True)
        acc = acc + gate[:, None] * (product + c[None, :])
    acc = activate_tile(acc, ACTIVATION)
    cells = y + m.to(gl.int64)[:, None] * OUT + n[None, :]
    gl.store(cells, acc.to(y.dtype.element_ty), mask=(m < ROWS)[:, None] & (n < OUT)[None, :])


@gluon.jit
def consume_backward(
    CONSUMER: gl.constexpr,
    shared,
    inputs,
    BN: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A [64, BN] tile of dh, the sum of g~_j V_j with V_j = dz A_j, and <V_j, h> of its columns."""
    gates, h, dh, dg, first_row, first_column, SLICES, ROWS, IN, STRIDE = inputs
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    m = first_row + 64 * CONSUMER + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    n = first_column + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
    inside = (m < ROWS)[:, None] & (n < IN)[None, :]
    at = m.to(gl.int64)[:, None] * IN + n[None, :]
    x = gl.load(h + at, mask=inside, other=0.0)
    acc = gl.zeros([64, BN], gl.float32, LAYOUT)
    product = gl.zeros([64, BN], gl.float32, LAYOUT)
    mbarrier.wait(shared[2], 0)
    for j in range(SLICES):
        gate = gl.load(gates + gl.cast(j, gl.int64) * STRIDE + m, mask=m < ROWS, other=0.0)
        product = multiply(CONSUMER, product, shared, j, STEPS, STAGES, FORWARD=False)
        acc = acc + gate[:, None] * product
        share = gl.sum(product * x.to(gl.float32), axis=1)
        gl.store(dg + gl.cast(j, gl.int64) * ROWS + m, share, mask=m < ROWS)
    gl.store(dh + at, acc.to(dh.dtype.element_ty), mask=inside)


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """Barriers of the resident rows and of the ring: filled once by a copy, emptied by two consumers."""
    resident_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(resident_full, count=1)
    for cell in gl.static_range(STAGES):
        mbarrier.init(full.index(cell), count=1)
        mbarrier.init(empty.index(cell), count=2)
    return resident_full, full, empty


@any_size
def specialised_forward(
    h_desc,
    slices_desc,
    gates,
    bias,
    y,
    ROWS,
    RANK,
    OUT,
    STRIDE,
    ACTIVATION: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A [128, BN] tile of y [ROWS, OUT]; slices_desc is of [(RANK + 1) OUT, IN], IN = STEPS BK."""
    resident = gl.allocate_shared_memory(gl.bfloat16, [2 * STEPS, 64, BK], h_desc.layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], slices_desc.layout)
    resident_full, full, empty = barriers(STAGES)
    row = gl.program_id(0) * 128
    column = gl.program_id(1) * BN
    slices = RANK + 1
    shared = (resident, ring, resident_full, full, empty)
    inputs = (gates, bias, y, row, column, slices, ROWS, OUT, STRIDE)
    gl.warp_specialize(
        [
            (consume_forward, (0, shared, inputs, ACTIVATION, BN, STEPS, STAGES)),
            (consume_forward, (1, shared, inputs, ACTIVATION, BN, STEPS, STAGES)),
            (
                produce,
                (h_desc, slices_desc, shared, row, column, slices, OUT, BK, STEPS, STAGES, True),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@any_size
def specialised_backward_input(
    dz_desc,
    slices_desc,
    gates,
    h,
    dh,
    dg,
    ROWS,
    RANK,
    IN,
    OUT,
    STRIDE,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A [128, BN] tile of dh [ROWS, IN] and its plane of dg, float32 [tiles of IN, RANK, ROWS].

    slices_desc is of [(RANK + 1) OUT, IN], OUT = STEPS BK. What biases give to dg is added elsewhere.
    """
    resident = gl.allocate_shared_memory(gl.bfloat16, [2 * STEPS, 64, BK], dz_desc.layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], slices_desc.layout)
    resident_full, full, empty = barriers(STAGES)
    row = gl.program_id(0) * 128
    column = gl.program_id(1) * BN
    slices = RANK + 1
    plane = dg + gl.program_id(1).to(gl.int64) * slices * ROWS
    shared = (resident, ring, resident_full, full, empty)
    inputs = (gates, h, dh, plane, row, column, slices, ROWS, IN, STRIDE)
    gl.warp_specialize(
        [
            (consume_backward, (0, shared, inputs, BN, STEPS, STAGES)),
            (consume_backward, (1, shared, inputs, BN, STEPS, STAGES)),
            (
                produce,
                (dz_desc, slices_desc, shared, row, column, slices, OUT, BK, STEPS, STAGES, False),
            ),
        ],
        [4, 1],
        [240, 24],
    )
