"""What the kernels need of a GPU, by compiling every shipped tile ahead of time: no GPU is needed.

Spilled registers, too many of them for the blocks that shall share a multiprocessor, or too much shared
memory make a kernel slow or impossible to launch, and nothing but the compiler's own figures tells.
`python -m tests.trainer.ops.test_triton_resources` prints them as the table of docs/results/meta-layer.md.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.paths import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.ops import triton_diagonal, triton_meta
from trainer.ops.activation import ACTIVATIONS as FUSIBLE
from trainer.ops.triton_tiles import ACTIVATION_CODES, TILES, Tile, choose_tile, constants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: A100, H100 and H200
REGISTERS, WARPS = 65_536, 64  # of a multiprocessor, on both
SLACK = 16  # registers beyond those of the table
ACTIVATIONS = {code: name for name, code in ACTIVATION_CODES.items()}
POINTERS = {"h", "g", "weight", "bias", "y", "dz", "dh", "dg", "dweight", "dbias"}
WRITTEN = {"y", "dh", "dweight", "dbias"}  # of one type; dg is float32
KERNELS = triton_meta.KERNELS | triton_diagonal.KERNELS


def variants() -> Iterator[tuple[str, Tile, dict[str, Any], str, str]]:
    """Every shipped variant: kernel, tile, constants, Triton's names of the types read and written."""
    for kernel, itemsize, _, most_depth, tile in TILES:
        kinds = [("bf16", "tf32"), ("fp16", "tf32")]
        if itemsize == 4:
            kinds = [("fp32", "tf32"), ("fp32", "tf32x3")]
        for element, precision in kinds:
            values = constants(KERNELS[kernel], tile, most_depth is not None, precision)
            if kernel.endswith("forward"):
                for code in ACTIVATION_CODES.values():
                    yield kernel, tile, values | {"ACTIVATION": code}, element, element
            elif kernel == "diagonal_backward_weight":  # its sums are in float32
                yield kernel, tile, values, element, "fp32"
            else:
                yield kernel, tile, values, element, element
                if kernel == "backward_weight" and itemsize == 2:  # of several shares too
                    yield kernel, tile, values, element, "fp32"


VARIANTS = list(variants())
pytestmark = pytest.mark.slow


class Resources(NamedTuple):
    """Figures of one compiled kernel, and its assembly."""

    registers: int
    stack: int
    shared: int
    ptx: str


def compile_ahead(
    kernel: str, tile: Any, values: dict[str, Any], read: str, written: str, arch: int
) -> Any:
    """Compiles as the launchers would on that GPU: the same constants, types and alignment."""
    function = KERNELS[kernel]
    names = function.arg_names
    pointers = dict.fromkeys(POINTERS, f"*{read}") | dict.fromkeys(WRITTEN, f"*{written}")
    pointers["dg"] = "*fp32"
    signature = {
        name: "constexpr" if name in values else pointers.get(name, "i32") for name in names
    }
    aligned = (POINTERS - {"g"}) | {"IN", "OUT"}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in values.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@cache
def resources(index: int, arch: int) -> Resources:
    compiled = compile_ahead(*VARIANTS[index], arch)
    cubin = Path(triton.knobs.cache.dir) / f"variant-{index}-{arch}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report)}
    return Resources(
        figures["REG"],
        figures["STACK"] + figures["LOCAL"],
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )


def compile_into(folder: str, index: int, arch: int) -> None:
    """Compiles a variant in a process of its own; the cache in `folder` has it then."""
    triton.knobs.cache.dir = folder
    compile_ahead(*VARIANTS[index], arch)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Compiles anew, whatever earlier runs left, on all cores, and leaves nothing behind."""
    cells = [
        (item.callspec.params["index"], item.callspec.params["arch"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_tile_fits_the_gpu
    ]
    with triton.knobs.cache.scope():
        folder = triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            for cell in cells:
                pool.submit(compile_into, folder, *cell)  # what fails here fails again in its test
        yield


def name_of(index: int) -> str:
    kernel, tile, values, dtype, written = VARIANTS[index]
    once = "" if values.get("ONE_K", True) else "-loop"
    activation = f"-{ACTIVATIONS[values['ACTIVATION']]}" if "ACTIVATION" in values else ""
    types = dtype if written == dtype else f"{dtype}-to-{written}"
    name = f"{kernel}-{types}-{values['PRECISION']}-{tile.bm}x{tile.bn}x{tile.bk}{once}"
    return name + activation


def row_of(index: int) -> str:
    """The first cells of the variant's row on the page: one per tile and kind of element."""
    kernel, tile, values, dtype, _ = VARIANTS[index]
    element = f"fp32 as {values['PRECISION']}" if dtype == "fp32" else "16 bit"
    loop = "" if values.get("ONE_K", True) else ", depth loop"
    sizes = f"{tile.bm}x{tile.bn}x{tile.bk}, {tile.warps}, {tile.stages}"
    return f"| {kernel} | {element} | {sizes}{loop} |"


def blocks(found: Resources, warps: int, arch: int) -> int:
    """Blocks that a multiprocessor holds at once, by registers, shared memory and warps."""
    registers = -(-found.registers // 8) * 8 * 32 * warps  # given out by the eight
    # A block of any size takes 1 KB more, and one KB more than a block may have is there.
    shared = (SHARED_MEMORY[arch] + 1024) // (found.shared + 1024)
    return min(REGISTERS // registers, shared, WARPS // warps, 32)


@cache
def promised() -> dict[tuple[str, int], tuple[int, int]]:
    """Registers and blocks per multiprocessor by row and architecture, as the page has them."""
    found = {}
    for line in (
        (ROOT / "docs" / "results" / "meta-layer.md").read_text(encoding="utf-8").splitlines()
    ):
        if match := re.fullmatch(
            r"(\| \w+ward\w* \|.*\|) (\d+), \d+, (\d+) \| (\d+), \d+, (\d+) \|", line
        ):
            row, *figures = match.groups()
            on_80, on_90 = map(int, figures[:2]), map(int, figures[2:])
            found |= {(row, 80): (*on_80,), (row, 90): (*on_90,)}
    return found


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=name_of)
def test_tile_fits_the_gpu(index: int, arch: int) -> None:
    found, tile = resources(index, arch), VARIANTS[index][1]
    assert found.stack == 0, "registers spill to memory"
    assert 0 < found.shared <= SHARED_MEMORY[arch]
    # What counts is what fits. Registers may vary with the compiler's version, and only by a little.
    registers, fitting = promised()[row_of(index), arch]
    assert blocks(found, tile.warps, arch) >= fitting, found[:3]
    assert found.registers <= registers + SLACK, found[:3]
    # Tensor cores, and sums whose order does not depend on who comes first.
    hopper = arch == 90 and tile.bm >= 64  # whose own products take no fewer rows
    assert ("wgmma.mma_async" if hopper else "mma.sync") in found.ptx
    assert not re.search(r"\b(atom|red)\.(global|relaxed|acq)", found.ptx)


def test_every_variant_that_users_can_launch_is_compiled() -> None:
    assert set(ACTIVATION_CODES) == set(FUSIBLE)
    compiled = {
        (kernel, dtype, written, values.get("ACTIVATION"), values["PRECISION"], row_of(index))
        for index, (kernel, _, values, dtype, written) in enumerate(VARIANTS)
    }
    # Two types or precisions of each; forward with five activations, sums of 16 bit also in float32.
    counts = [10 if line[0].endswith("forward") else 2 for line in TILES]
    sums = 2 * sum(line[:2] == ("backward_weight", 2) for line in TILES)
    assert len(compiled) == len(VARIANTS) == sum(counts) + sums
    assert {row for *_, row in compiled} == {row for row, _ in promised()}


def test_a_fused_relu_keeps_what_is_not_a_number() -> None:
    """As PyTorch's does. The interpreter cannot tell: its maximum always does."""
    relu = ACTIVATION_CODES["relu"]
    for index, (*_, values, _, _) in enumerate(VARIANTS):
        if values.get("ACTIVATION") == relu:
            for arch in SHARED_MEMORY:
                assert not re.search(r"\bmax\.f32", resources(index, arch).ptx)
                assert "max.NaN.f32" in resources(index, arch).ptx


def test_the_gate_notices_a_tile_that_is_too_large() -> None:
    kernel, _, values, *types = next(one for one in VARIANTS if not one[2].get("ONE_K", True))
    tile = Tile(128, 256, 64, 8, 3)
    again = constants(KERNELS[kernel], tile, False, values["PRECISION"])
    VARIANTS.append((kernel, tile, values | again, *types))
    try:
        assert resources(len(VARIANTS) - 1, 80).stack > 0
    finally:
        VARIANTS.pop()


def test_the_gate_notices_one_block_less() -> None:
    """Eight registers more, or a stage of shared memory more, and the second block has no room."""
    row = "| forward | 16 bit | 128x64x128, 8, 2 |"
    assert promised()[row, 90] == (128, 2)
    assert blocks(Resources(128, 0, 65536, ""), 8, 90) == 2
    assert blocks(Resources(136, 0, 65536, ""), 8, 90) == 1
    assert blocks(Resources(128, 0, 116 * 1024, ""), 8, 90) == 1
    assert blocks(Resources(32, 0, 0, ""), 1, 80) == 32


def test_every_line_of_the_table_is_reached() -> None:
    widths = (1, 16, 32, 33, 64, 65, 128, 129, 512)
    reached = {
        (kernel, size, *choose_tile(kernel, size, columns, depth))
        for kernel in KERNELS
        for size in (2, 4)
        for columns in widths
        for depth in widths
    }
    for kernel, size, _, most_depth, tile in TILES:
        assert (kernel, size, tile, most_depth is not None) in reached
    with pytest.raises(ValueError, match="8 bytes"):
        choose_tile("forward", 8, 1, 1)


if __name__ == "__main__":
    print("| kernel | element | tile (rows x columns x depth), warps, stages |", end="")
    print(" sm_80 registers, shared KB, blocks | sm_90 registers, shared KB, blocks |")
    print("|---|---|---|---|---|")
    Path(triton.knobs.cache.dir).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[int]] = {}
    for at in range(len(VARIANTS)):
        rows.setdefault(row_of(at), []).append(at)
    for row, variants_of_row in rows.items():
        for arch in SHARED_MEMORY:
            cells = [resources(at, arch) for at in variants_of_row]
            assert all(one.stack == 0 for one in cells)
            # The most that any element type or activation takes, and the fewest blocks.
            fewest = min(blocks(one, VARIANTS[variants_of_row[0]][1].warps, arch) for one in cells)
            registers, shared = (max(one[k] for one in cells) for k in (0, 2))
            row += f" {registers}, {shared / 1024:.0f}, {fewest} |"
        print(row, flush=True)
