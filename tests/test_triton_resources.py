"""What the kernels need of a GPU, by compiling every shipped tile ahead of time: no GPU is needed.

Spilled registers, too many of them, or too much shared memory make a kernel slow or impossible to
launch, and nothing but the compiler's own figures tells. `python -m tests.test_triton_resources`
prints them as a table.
"""

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.ops import triton_meta
from trainer.ops.triton_meta import KERNELS, TILES, choose_tile, variants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: A100, H100 and H200
POINTERS = {"h", "g", "weight", "bias", "y", "dz", "dh", "dg", "dweight"}
VARIANTS = list(variants())
pytestmark = pytest.mark.slow


class Resources(NamedTuple):
    """Figures of one compiled kernel, and its assembly."""

    registers: int
    stack: int
    shared: int
    ptx: str


def compile_ahead(kernel: str, tile: Any, values: dict[str, Any], dtype: str, arch: int) -> Any:
    """Compiles as the launchers would on that GPU: the same constants, the same alignment."""
    function = KERNELS[kernel]
    names = function.arg_names
    signature = {
        name: "constexpr"
        if name in values
        else ("*fp32" if name == "dg" else f"*{dtype}")
        if name in POINTERS
        else "i32"
        for name in names
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


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles anew, whatever earlier runs left, and leaves nothing behind."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def name_of(index: int) -> str:
    kernel, tile, values, dtype = VARIANTS[index]
    once = "" if values.get("ONE_K", True) else "-loop"
    return f"{kernel}-{dtype}-{values['PRECISION']}-{tile.bm}x{tile.bn}x{tile.bk}{once}"


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=name_of)
def test_tile_fits_the_gpu(index: int, arch: int) -> None:
    found = resources(index, arch)
    assert found.stack == 0, "registers spill to memory"
    assert 0 < found.registers <= 255
    assert 0 < found.shared <= SHARED_MEMORY[arch]
    # Tensor cores, and sums whose order does not depend on who comes first.
    assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in found.ptx
    assert not re.search(r"\b(atom|red)\.(global|relaxed|acq)", found.ptx)


def test_the_gate_notices_a_tile_that_is_too_large() -> None:
    kernel, _, values, dtype = VARIANTS[3]
    tile = triton_meta.Tile(128, 256, 64, 8, 3)
    VARIANTS.append((kernel, tile, values | tile.sizes(), dtype))
    try:
        assert resources(len(VARIANTS) - 1, 80).stack > 0
    finally:
        VARIANTS.pop()


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
    print(" sm_80 registers, shared KB | sm_90 registers, shared KB |\n|---|---|---|---|---|")
    Path(triton.knobs.cache.dir).mkdir(parents=True, exist_ok=True)
    for index, (kernel, tile, values, dtype) in enumerate(VARIANTS):
        loop = "" if values.get("ONE_K", True) else ", depth loop"
        element = dtype if dtype == "bf16" else f"{dtype} as {values['PRECISION']}"
        cells = [resources(index, arch) for arch in SHARED_MEMORY]
        figures = " | ".join(f"{one.registers}, {one.shared / 1024:.0f}" for one in cells)
        assert all(one.stack == 0 for one in cells)
        sizes = f"{tile.bm}x{tile.bn}x{tile.bk}, {tile.warps}, {tile.stages}"
        print(f"| {kernel} | {element} | {sizes}{loop} | {figures} |")
