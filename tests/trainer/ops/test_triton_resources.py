"""What the kernels need of a GPU, by compiling every shipped tile ahead of time: no GPU is needed.

Spilled registers, too many of them for the blocks that shall share a multiprocessor, too much shared
memory, products that the assembler runs one by one or loads that nothing overlaps make a kernel slow or
impossible to launch, and nothing but the compiler's own figures tells.
`python -m tests.trainer.ops.test_triton_resources` prints them as the table of docs/results/meta-layer.md.
Another triton is taken by PYTHONPATH, as that page says.
"""

import importlib.util
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest

from tests.helpers.paths import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.trainer.ops.ahead_of_time import Compiled, compile_ahead
from tests.trainer.ops.kernels_before import weight_by_register
from trainer.ops import triton_diagonal, triton_meta
from trainer.ops.activation import ACTIVATIONS as FUSIBLE
from trainer.ops.triton_tiles import ACTIVATION_CODES, TILES, Tile, choose_tile, constants

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: A100, H100 and H200
REGISTERS, WARPS = 65_536, 64  # of a multiprocessor, on both
SLACK = 16  # registers beyond those of the table
ACTIVATIONS = {code: name for name, code in ACTIVATION_CODES.items()}
KERNELS = triton_meta.KERNELS | triton_diagonal.KERNELS | {"sum": triton_meta.meta_sum}
LINES = [*TILES, *(("sum", size, None, None, triton_meta._SUM) for size in (2, 4))]
MOST = ACTIVATION_CODES["tanh"]  # that takes the most instructions


def variants() -> Iterator[tuple[str, Tile, dict[str, Any], str, str]]:
    """Shipped variants: kernel, tile, constants, Triton's names of the types read and written.

    float16 is compiled where most can go wrong, and so is one TF32 product where three fit: they differ
    from bfloat16 and from three products by an instruction of another name, or by fewer.
    """
    for kernel, itemsize, _, most_depth, tile in LINES:
        kinds = [("bf16", "tf32", True), ("fp16", "tf32", False)]
        if itemsize == 4:
            kinds = [("fp32", "tf32x3", True), ("fp32", "tf32", False)]
        for element, precision, is_every in kinds:
            if kernel == "sum" and not is_every:
                continue
            values = constants(KERNELS[kernel], tile, most_depth is not None, precision)
            written = [element] if itemsize == 4 else [element, "fp32"]  # of several parts
            if kernel == "sum" or kernel.endswith("forward"):
                for code in ACTIVATION_CODES.values() if is_every else [MOST]:
                    read = "fp32" if kernel == "sum" else element
                    yield kernel, tile, values | {"ACTIVATION": code}, read, element
                if kernel == "forward" and itemsize == 2:
                    yield kernel, tile, values | {"ACTIVATION": 0}, element, "fp32"
            elif kernel == "diagonal_backward_weight":  # its sums are in float32
                yield kernel, tile, values, element, "fp32"
            elif kernel == "backward_input":
                for type_written in written if is_every else [element]:
                    for is_tail in (False, True) if is_every else [True]:
                        yield kernel, tile, values | {"TAIL": is_tail}, element, type_written
            else:
                for type_written in written if kernel == "backward_weight" else [element]:
                    yield kernel, tile, values, element, type_written


VARIANTS = list(variants())
# An A100's figures are held for the variant of each tile and type that takes the most.
CELLS = [
    (index, arch)
    for index, (kernel, _, values, read, written) in enumerate(VARIANTS)
    for arch in SHARED_MEMORY
    if arch == 90
    or (
        values.get("ACTIVATION", MOST) == MOST
        and values.get("TAIL", True)
        and (read == written or kernel in ("sum", "diagonal_backward_weight"))
    )
]
pytestmark = pytest.mark.slow


def compile_variant(index: int, arch: int) -> Compiled:
    """Compiles as the launchers would on that GPU: the same constants, types and alignment."""
    kernel, tile, values, read, written = VARIANTS[index]
    return compile_ahead(
        *(KERNELS[kernel], tile, values, read, written, arch),
        with_loop=arch == 90 and tile.bm >= 64 and values.get("ACTIVATION", MOST) == MOST,
    )


_FUTURES: dict[tuple[int, int], Future[Compiled]] = {}


@cache
def compiled(index: int, arch: int) -> Compiled:
    future = _FUTURES.get((index, arch))
    return future.result() if future else compile_variant(index, arch)


@pytest.fixture(autouse=True, scope="module")
def ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles on all cores what this session's tests ask for."""
    cells = [
        (item.callspec.params["index"], item.callspec.params["arch"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_tile_fits_the_gpu
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        _FUTURES.update({cell: pool.submit(compile_variant, *cell) for cell in cells})
        yield
        _FUTURES.clear()
        pool.shutdown(cancel_futures=True)


def name_of(cell: tuple[int, int]) -> str:
    kernel, tile, values, dtype, written = VARIANTS[cell[0]]
    parts = [kernel, dtype if written == dtype else f"{dtype}-to-{written}"]
    parts += [str(values.get("PRECISION", "")), f"{tile.bm}x{tile.bn}x{tile.bk}"]
    parts += ["loop"] * (not values.get("ONE_K", True)) + ["tail"] * values.get("TAIL", False)
    parts += [ACTIVATIONS[values["ACTIVATION"]]] if "ACTIVATION" in values else []
    return "-".join([*parts, str(cell[1])])


def row_of(index: int) -> str:
    """The first cells of the variant's row on the page: one per tile and kind of element."""
    kernel, tile, values, dtype, written = VARIANTS[index]
    element = f"fp32 as {values.get('PRECISION')}" if dtype == "fp32" else "16 bit"
    if kernel == "sum":
        element = f"fp32 to {'fp32' if written == 'fp32' else '16 bit'}"
    loop = "" if values.get("ONE_K", True) else ", depth loop"
    sizes = f"{tile.bm}x{tile.bn}x{tile.bk}, {tile.warps}, {tile.stages}{loop}"
    sizes += ", 2 slices" * (tile.slices == 2)
    return f"| {kernel} | {element} | {sizes} |"


def blocks(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks that a multiprocessor holds at once, by registers, shared memory and warps."""
    granted = -(-registers // 8) * 8 * 32 * warps  # given out by the eight
    # A block of any size takes 1 KB more, and one KB more than a block may have is there.
    by_shared = (SHARED_MEMORY[arch] + 1024) // (shared + 1024)
    return min(REGISTERS // granted, by_shared, WARPS // warps, 32)


@cache
def promised() -> dict[tuple[str, int], tuple[int, int]]:
    """Registers and blocks per multiprocessor by row and architecture, as the page has them."""
    rows = {}
    page = ROOT / "docs" / "results" / "meta-layer.md"
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(
            r"(\| (?:\w+ward\w*|sum) \|.*\|) (\d+), \d+, (\d+) \| (\d+), \d+, (\d+) \|", line
        ):
            row, *figures = match.groups()
            on_80, on_90 = map(int, figures[:2]), map(int, figures[2:])
            rows |= {(row, 80): (*on_80,), (row, 90): (*on_90,)}
    return rows


@pytest.mark.parametrize(("index", "arch"), CELLS, ids=map(name_of, CELLS))
def test_tile_fits_the_gpu(index: int, arch: int) -> None:
    (kernel, tile, *_), built = VARIANTS[index], compiled(index, arch)
    assert built.stack == 0, "registers spill to memory"
    assert 0 <= built.shared <= SHARED_MEMORY[arch]
    # What counts is what fits. Registers may vary with the compiler's version, and only by a little.
    registers, fitting = promised()[row_of(index), arch]
    assert blocks(built.registers, built.shared, tile.warps, arch) >= fitting, built.figures
    assert built.registers <= registers + SLACK, built.figures
    # Sums whose order does not depend on who comes first.
    assert not built.atomics
    assert built.warnings == [], "the assembler serialises products"
    if kernel == "sum":
        return
    hopper = arch == 90 and tile.bm >= 64  # whose own products take no fewer rows
    assert built.products == ("wgmma.mma_async" if hopper else "mma.sync")
    if loop := built.main_loop:
        assert 2 * loop.product_waits <= loop.products, "a wait for every product"
        assert loop.async_copies > 0
        if tile.stages > 2:
            assert loop.copies_in_flight >= 1, "the next tile is not under way when one is used"


def test_the_kernel_before_is_refused() -> None:
    """dA_j = (g_j dz)^T h, scaled in registers, was serialised: a wait for each of its four products."""
    for tile in (Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 2)):
        values = constants(weight_by_register, tile, True, "tf32")
        built = compile_ahead(weight_by_register, tile, values, "bf16", "bf16", 90)
        assert built.warnings == ["C7515"]
        assert built.main_loop.product_waits == built.main_loop.products == 4


def test_every_tile_is_compiled_for_every_type_and_activation() -> None:
    assert set(ACTIVATION_CODES) == set(FUSIBLE)
    rows: dict[str, set[tuple[Any, ...]]] = {}
    for index, (_, _, values, read, written) in enumerate(VARIANTS):
        combination = (read, written, values.get("ACTIVATION"), values.get("TAIL"))
        rows.setdefault(row_of(index), set()).add(combination)
    assert set(rows) == {row for row, _ in promised()}
    for row, combinations in rows.items():
        read, written, activations, tails = map(set, zip(*combinations, strict=True))
        if "16 bit" in row and "sum" not in row:
            assert read == {"bf16", "fp16"}
            assert ("fp32" in written) is not row.startswith(
                ("| diagonal_f", "| diagonal_backward_i")
            )
        if "forward" in row and "as tf32 " not in row:
            assert activations == set(ACTIVATION_CODES.values())
        if row.startswith("| backward_input") and "as tf32 " not in row:
            assert tails == {False, True}
    assert {row_of(index) for index, arch in CELLS if arch == 80} == set(rows)


def test_a_fused_relu_keeps_what_is_not_a_number() -> None:
    """As PyTorch's does. The interpreter cannot tell: its maximum always does."""
    relu = ACTIVATION_CODES["relu"]
    for index, (_, _, values, *_) in enumerate(VARIANTS):
        if values.get("ACTIVATION") == relu:
            assert compiled(index, 90).maxima == {"max.NaN.f32"}


def test_the_gate_notices_a_tile_that_is_too_large() -> None:
    tile = Tile(128, 256, 64, 8, 3)
    values = constants(triton_meta.meta_forward, tile, False, "tf32") | {"ACTIVATION": 0}
    assert compile_ahead(triton_meta.meta_forward, tile, values, "bf16", "bf16", 90).stack > 0


def test_the_gate_notices_one_block_less() -> None:
    """Eight registers more, or a stage of shared memory more, and the second block has no room."""
    row = "| backward_input | 16 bit | 128x64x128, 8, 3 |"
    assert promised()[row, 90] == (128, 2)
    assert blocks(128, 82432, 8, 90) == 2
    assert blocks(136, 82432, 8, 90) == 1
    assert blocks(128, 116 * 1024, 8, 90) == 1
    assert blocks(32, 0, 1, 80) == 32


def test_every_line_of_the_table_is_reached() -> None:
    widths = (1, 16, 32, 33, 64, 65, 128, 129, 256, 257, 512)
    kernels = triton_meta.KERNELS | triton_diagonal.KERNELS
    reached = {
        (kernel, size, *choose_tile(kernel, size, columns, depth))
        for kernel in kernels
        for size in (2, 4)
        for columns in widths
        for depth in widths
    }
    for kernel, size, _, most_depth, tile in TILES:
        assert (kernel, size, tile, most_depth is not None) in reached
    with pytest.raises(ValueError, match="8 bytes"):
        choose_tile("forward", 8, 1, 1)


def print_table() -> None:
    """The table of the page: of each row the most that a variant takes, and the fewest blocks."""
    print("| kernel | element | tile (rows x columns x depth), warps, stages |", end="")
    print(" sm_80 registers, shared KB, blocks | sm_90 registers, shared KB, blocks |")
    print("|---|---|---|---|---|")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        futures = {cell: pool.submit(compile_variant, *cell) for cell in CELLS}
        for row in dict.fromkeys(row_of(index) for index, _ in CELLS):
            text = row
            for arch in SHARED_MEMORY:
                mine = [cell for cell in CELLS if row_of(cell[0]) == row and cell[1] == arch]
                warps = VARIANTS[mine[0][0]][1].warps
                built = [futures[cell].result() for cell in mine]
                registers = max(one.registers for one in built)
                shared = max(one.shared for one in built)
                fewest = min(blocks(one.registers, one.shared, warps, arch) for one in built)
                text += f" {registers}, {shared / 1024:.0f}, {fewest} |"
                for cell, one in zip(mine, built, strict=True):
                    if one.stack or one.warnings:
                        text += f" !! {name_of(cell)} spills {one.stack} {one.warnings}"
            print(text, flush=True)


if __name__ == "__main__":
    print_table()
