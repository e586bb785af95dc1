"""Compiles a Triton kernel for a GPU that is not there, and reads what the assembler made of it."""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.ops.triton_tiles import compiler_options

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
POINTERS = {"h", "g", "weight", "bias", "y", "dz", "dh", "dweight", "dbias"}
FLOAT32 = {"gates", "dg", "partial"}
WRITTEN = {"y", "dh", "dweight", "dbias"}  # of one type
UNALIGNED = {"g"}  # of which anything may come, and the launchers do not copy it
MULTIPLES = {"IN", "OUT", "STRIDE", "SIZE", "rows_per_share"}  # of 16, as the launchers see to


class Loop(NamedTuple):
    """Of the machine code's loop with the most products, as it runs once."""

    products: int  # instructions for tensor cores of a whole warp group
    product_waits: int  # how often they are waited for
    async_copies: int  # from global to shared memory
    copies_in_flight: int  # groups of them that the least strict wait leaves under way


class Compiled(NamedTuple):
    """Figures of one compiled kernel."""

    registers: int
    stack: int
    shared: int
    warnings: list[str]  # of the assembler, that it serialises products: C75xx
    products: str
    atomics: bool
    maxima: set[str]
    main_loop: Loop | None

    @property
    def figures(self) -> tuple[int, ...]:
        return self.registers, self.stack, self.shared


def compile_ahead(
    function: Any,
    tile: Any,
    values: dict[str, Any],
    read: str,
    written: str,
    arch: int,
    with_loop: bool = True,
) -> Compiled:
    """Compiles anew, whatever earlier runs left, and leaves nothing behind.

    Args:
        function: The kernel.
        tile: Of the tile table.
        values: Its compile-time constants.
        read: Triton's name of the type of what is read.
        written: The same of what is written.
        arch: 80 or 90.
        with_loop: Whether to disassemble and look at the main loop, which takes half as long again.
    """
    names = function.arg_names
    pointers = dict.fromkeys(POINTERS, f"*{read}") | dict.fromkeys(WRITTEN, f"*{written}")
    pointers |= dict.fromkeys(FLOAT32, "*fp32")
    signature = {
        name: "constexpr" if name in values else pointers.get(name, "i32") for name in names
    }
    aligned = (POINTERS | FLOAT32) - UNALIGNED | MULTIPLES
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in values.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in aligned},
    )
    options = compiler_options(tile, arch)
    log = io.StringIO()
    with (
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        loop = main_loop(disassembled(built.asm["cubin"], Path(folder))) if with_loop else None
    return figures_of(built.asm["ptx"], log.getvalue(), built.metadata.shared, loop)


def disassembled(cubin: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [DISASSEMBLER, "-c", file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures_of(ptx: str, log: str, shared: int, loop: Loop | None) -> Compiled:
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    assert registers, log
    assert stack, log
    kinds = [name for name in ("wgmma.mma_async", "mma.sync") if name in ptx]
    return Compiled(
        int(registers[1]),
        int(stack[1]),
        shared,
        sorted(set(re.findall(r"\bC75\d\d\b", log))),
        kinds[0] if kinds else "",
        bool(re.search(r"\b(atom|red)\.(global|relaxed|acq)", ptx)),
        set(re.findall(r"\bmax\.\S*f32", ptx)),
        loop,
    )


def main_loop(machine_code: str) -> Loop:
    """Of all loops that hold no other, the one with the most products, of those that load ahead."""
    lines = machine_code.splitlines()
    labels = {
        match[1]: at for at, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))
    }
    spans = [
        (labels[match[1]], at)
        for at, line in enumerate(lines)
        if (match := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and labels[match[1]] < at
    ]
    innermost = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b < last for a, b in spans if (a, b) != (first, last))
    ]
    loops = [loop_of("\n".join(lines[first : last + 1])) for first, last in innermost]
    return max(
        loops, key=lambda loop: (loop.async_copies > 0, loop.products), default=Loop(0, 0, 0, 0)
    )


def loop_of(text: str) -> Loop:
    waits = [int(number, 16) for number in re.findall(r"\bDEPBAR\.LE SB0, (0x\w+)", text)]
    return Loop(
        len(re.findall(r"\bHGMMA\.", text)),
        len(re.findall(r"\bWARPGROUP\.DEPBAR\b", text)),
        len(re.findall(r"\bLDGSTS\b|\bUTMALDG\b", text)),
        max(waits, default=0),
    )
