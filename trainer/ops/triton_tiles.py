"""What the Triton kernels of this package share: their tile table, products and activations on chip.

Needs `triton` to import. Under TRITON_INTERPRET=1 (set before the import) the kernels run on CPU tensors,
which is how they are tested without a GPU.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The interpreter multiplies bfloat16 operands of a dot as if their bits were integers.
_WIDEN = tl.constexpr(INTERPRETING)

# One compiled variant for every batch size and rank. Widths are padded to a multiple of 16 by the
# launchers, and shares of the batch are multiples of a block: loads that cannot be vectorised cost so
# many registers that the tiles would spill.
any_size = triton.jit(
    do_not_specialize=["ROWS", "RANK", "WIDTH", "slices_per_part", "parts"],
    do_not_specialize_on_alignment=["g"],
)
ACTIVATION_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "sigmoid": 3, "tanh": 4}


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """The sum acc + a b, in float32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_gates(g, m, in_m, j, RANK):
    """A block of g~ [rows, RANK + 1]: g, and 1 for slice RANK."""
    gates = tl.load(
        g + m[:, None] * RANK + j[None, :], mask=in_m[:, None] & (j < RANK)[None, :], other=0.0
    )
    return gates + tl.where(j == RANK, 1.0, 0.0).to(gates.dtype)[None, :]


@triton.jit
def load_slices(slices, j, n, in_n, RANK, OUT):
    """A block of biases or diagonals [RANK + 1, OUT]."""
    inside = (j <= RANK)[:, None] & in_n[None, :]
    return tl.load(slices + j[:, None] * OUT + n[None, :], mask=inside, other=0.0)


@triton.jit
def activate_tile(z, ACTIVATION: tl.constexpr):
    """One of ACTIVATION_CODES, of a float32 tile."""
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


@dataclass(frozen=True)
class Tile:
    """Block sizes (rows, columns, depth of the product), warps and pipeline stages of a program.

    `slices` are those whose weights' gradient a program sums at a time. `registers` is the most that a
    thread may have on Hopper, where the compiler would otherwise take a few more and a second block
    had no room. `stages_before_hopper` are fewer than `stages` where those make a thread spill there.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    slices: int = 1
    registers: int | None = None
    stages_before_hopper: int | None = None


# (kernel, bytes per element, most columns, most depth) -> tile; None = any. The first that fits is
# taken. Depth within the limit means that the resident operand is loaded once (ONE_K). Chosen by
# registers, spills and shared memory as compiled for sm_80 and sm_90 (test_triton_resources.py
# holds every line to them); NOT by time on a GPU, which nobody has measured yet.
TILES: list[tuple[str, int, int | None, int | None, Tile]] = [
    ("forward", 2, 32, 64, Tile(64, 32, 64, 4, 3)),
    ("forward", 2, None, 64, Tile(128, 64, 64, 8, 3)),
    ("forward", 2, None, 128, Tile(128, 64, 128, 8, 3, 1, 128, 2)),
    ("forward", 2, None, 256, Tile(128, 64, 256, 8, 3, 1, None, 2)),
    ("forward", 2, None, None, Tile(128, 128, 64, 8, 3)),
    ("forward", 4, None, 64, Tile(64, 32, 64, 4, 2)),
    ("forward", 4, None, None, Tile(64, 32, 32, 4, 3)),
    ("backward_input", 2, 32, 64, Tile(64, 32, 64, 4, 3)),
    ("backward_input", 2, None, 64, Tile(64, 64, 64, 4, 3)),
    ("backward_input", 2, None, 128, Tile(128, 64, 128, 8, 3, registers=128)),
    ("backward_input", 2, None, 256, Tile(128, 64, 256, 8, 3)),
    ("backward_input", 2, None, None, Tile(64, 128, 64, 8, 3)),
    ("backward_input", 4, None, 64, Tile(64, 32, 64, 8, 2)),
    ("backward_input", 4, None, None, Tile(64, 32, 32, 8, 3)),
    ("backward_weight", 2, 64, None, Tile(64, 64, 64, 4, 3, slices=2)),
    ("backward_weight", 2, None, None, Tile(64, 128, 64, 8, 3, slices=2)),
    ("backward_weight", 4, None, None, Tile(64, 64, 32, 4, 2)),
    # Of diagonal slices, 16 at a time.
    ("diagonal_forward", 2, None, None, Tile(32, 64, 16, 8, 2)),
    ("diagonal_forward", 4, None, None, Tile(32, 64, 16, 8, 2)),
    ("diagonal_backward_input", 2, None, None, Tile(32, 64, 16, 4, 2)),
    ("diagonal_backward_input", 4, None, None, Tile(32, 32, 16, 4, 2)),
    ("diagonal_backward_weight", 2, None, None, Tile(16, 64, 64, 8, 2)),
    ("diagonal_backward_weight", 4, None, None, Tile(16, 64, 32, 8, 2)),
]


def choose_tile(kernel: str, itemsize: int, columns: int, depth: int) -> tuple[Tile, bool]:
    """The tile for a kernel.

    Args:
        kernel: Its name in the table.
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


def constants(kernel: Any, tile: Tile, one_k: bool, precision: str) -> dict[str, Any]:
    """The compile-time constants that a kernel has, but for the activation and the tail of columns."""
    values = {"PRECISION": precision, "ONE_K": one_k, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    values["SLICES"] = tile.slices
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def compiler_options(tile: Tile, capability: int) -> dict[str, Any]:
    """How Triton compiles a program with a tile for a GPU of a compute capability, 80 or 90."""
    if capability >= 90:
        stages, registers = tile.stages, tile.registers
    else:  # where operands of tensor cores lie in registers
        stages, registers = tile.stages_before_hopper or tile.stages, None
    return {"num_warps": tile.warps, "num_stages": stages, "maxnreg": registers}


def precision_of(dtype: torch.dtype) -> str:
    """How `dot` multiplies elements of a type."""
    # float32 on tensor cores: three products make up for TF32's short mantissa, unless the user
    # traded precision for speed for every other product as well. Asked by the name that torch has had
    # since 2.9: the older one, `allow_tf32`, raises where a user has set the newer.
    matmul = torch.backends.cuda.matmul
    is_fast = dtype != torch.float32 or matmul.fp32_precision == "tf32"
    return "tf32" if is_fast else "tf32x3"


def start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    tile: Tile,
    one_k: bool = True,
    **further: int,
) -> None:
    """Starts a kernel with a tile; the type of the first argument, a tensor, says how it multiplies.

    Args:
        kernel: Decorated with `any_size`.
        grid: Programs.
        arguments: What is not a compile-time constant, in order.
        tile: Of `choose_tile`.
        one_k: As `choose_tile` says it.
        further: Compile-time constants that `constants` does not know.
    """
    # Triton starts a kernel on the current device, wherever the tensors are.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](
            *arguments,
            **compiler_options(tile, _capability(arguments[0].device)),
            **constants(kernel, tile, one_k, precision_of(arguments[0].dtype)),
            **further,
        )


def padded(tensor: Tensor, *widths: int, to: int = 16) -> Tensor:
    """Its last dimensions filled up with zeros to multiples of `to`; contiguous, aligned to 16 bytes."""
    extra: list[int] = []
    for width in widths:
        extra += [0, -width % to]
    tensor = F.pad(tensor, extra) if any(extra) else tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _capability(device: torch.device) -> int:
    """Of a GPU, as 80 or 90; the interpreter's is that of a Hopper."""
    if device.type != "cuda":
        return 90
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; under the interpreter a few, so that a batch is shared out as on a GPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def transposed_gates(g: Tensor) -> Tensor:
    """g~ as float32 [r+1, B filled up to a multiple of 16]: rows that are read side by side.

    Numbers of 2 bytes could neither be copied to shared memory ahead of their use nor be read alike by
    the kernels that scale in float32.
    """
    rows, rank = g.shape
    gates = g.new_empty(rank + 1, triton.cdiv(rows, 16) * 16, dtype=torch.float32)
    gates[:rank, :rows] = g.t()
    gates[rank] = 1.0
    return gates


@cache
def ways_to_split(processors: int, programs: int, most: int) -> int:
    """Parts, at most `most`, of every program, such that two a multiprocessor are busy to the end.

    Of a few programs more than fit at once, the last would run alone. Parts have to be added up, so
    the fewest are taken that come within a fifth of the best.
    """

    def rounds(parts: int) -> float:
        return triton.cdiv(programs * parts, 2 * processors) / parts

    best = min(rounds(parts) for parts in range(1, max(most, 1) + 1))
    return next(parts for parts in range(1, most + 1) if rounds(parts) <= 1.2 * best)


def share_of_batch(processors: int, programs: int, rows: int, widest: int, block: int) -> int:
    """Rows of a part of the batch that the weights' kernel sums apart, a multiple of `block`.

    Parts have 512 rows at least, and what they read of the widest input is numbered by 32 bits.
    """
    shares = ways_to_split(processors, programs, min(triton.cdiv(rows, 512), 2 * processors))
    even = triton.cdiv(triton.cdiv(rows, shares), block) * block
    return min(even, 2**31 // widest // block * block)


def slices_of_a_part(processors: int, programs: int, slices: int) -> int:
    """Slices that a program of the forward pass, or of its gradient, goes through.

    All, or a part of them, four at least, where the batch is too small to keep a GPU busy.
    """
    return triton.cdiv(slices, ways_to_split(processors, programs, max(slices // 4, 1)))
