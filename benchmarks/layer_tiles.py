"""Times the fused kernels with every candidate tile: `python -m benchmarks.meta_layer --tiles`."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from benchmarks.layer_timing import timed

if TYPE_CHECKING:
    from trainer.ops.triton_tiles import Tile

# As in the tile table: kernel, bytes per element, most columns, most depth, tile.
Line: TypeAlias = "tuple[str, int, int | None, int | None, Tile]"


def candidates(kernel: str, itemsize: int, columns: int, depth: int) -> list[Line]:
    """Lines of the tile table that a kernel could have for a shape, as far as memory on chip allows."""
    from trainer.ops.triton_tiles import Tile

    found: list[Line] = []
    if kernel.startswith("diagonal"):  # 16 slices at a time, whatever the rank
        of_batch = kernel == "diagonal_backward_weight"
        rows, depths = ((16,), (32, 64, 128)) if of_batch else ((16, 32, 64), (16,))
        for bm, bn, bk, warps, stages in itertools.product(
            rows, (32, 64, 128), depths, (2, 4, 8), (1, 2)
        ):
            found.append((kernel, itemsize, columns, None, Tile(bm, bn, bk, warps, stages)))
        return found
    # Elements of 2 bytes take small blocks only where nothing else fills them.
    least_n, least_k = (32 if itemsize == 4 or one < 64 else 64 for one in (columns, depth))
    widths = [one for one in (32, 64, 128, 256) if least_n <= one <= max(columns, 32)]
    depths = [one for one in (32, 64, 128, 256) if least_k <= one <= max(depth, 32)]
    of_weight = kernel == "backward_weight"
    for bm, bn, bk, warps, stages in itertools.product(
        (64, 128), widths, depths, (4, 8), (2, 3, 4)
    ):
        once = not of_weight and bk >= depth  # the resident operand is loaded once
        staged = bk * (bn if once else bm + bn) * stages + (bm * bk if once else 0)
        if staged * itemsize > 200 * 1024 or bm * bn > 128 * 128:
            continue
        forms: list[dict[str, int]] = [{}]
        if of_weight and itemsize == 2 and stages == 3 and bk == 64:
            forms.append({"slices": 2})
        if once and itemsize == 2 and warps == 8 and bm * bn == 128 * 64:
            forms.append({"registers": 128})  # for which there is room in a second block
        if once and itemsize == 2 and bk > 64 and stages == 3 and kernel == "forward":
            forms += [form | {"stages_before_hopper": 2} for form in forms]
        for form in forms:
            tile = Tile(bm, bn, bk, warps, stages, **form)
            found.append((kernel, itemsize, columns, bk if once else None, tile))
    return found


def sweep(
    shape: tuple[int, int, int, int],
    rounds: int,
    device: str,
    dtype: torch.dtype,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Times each fused kernel with the table's tile and every candidate (the first `most`)."""
    from triton.runtime.errors import OutOfResources

    from trainer.ops import triton_diagonal, triton_meta
    from trainer.ops.triton_tiles import TILES, choose_tile, transposed_gates

    batch, rank, i, o = shape
    sizes = [(batch, i), (batch, rank), (rank + 1, o, i), (rank + 1, o), (batch, o)]
    h, g, weight, bias, dz = ((torch.randn(*one) * i**-0.5).to(device, dtype) for one in sizes)
    gate = (dz, g, bias, bias)  # h, g, weight, bias of diagonals
    gates = transposed_gates(g)
    kernels: dict[str, tuple[Callable[[], Any], int, int]] = {
        "forward": (lambda: triton_meta.fused_forward(h, g, weight, bias, "relu"), o, i),
        "backward_input": (
            lambda: triton_meta.launch_backward_input(dz, h, gates, weight, bias, i),
            i,
            o,
        ),
        "backward_weight": (
            lambda: triton_meta.launch_backward_weight(dz, h, gates, weight),
            i,
            0,
        ),
        "diagonal_forward": (lambda: triton_diagonal.fused_forward(*gate, "relu"), o, rank + 1),
        "diagonal_backward_input": (
            lambda: triton_diagonal.launch_backward_input(dz, *gate),
            o,
            rank + 1,
        ),
        "diagonal_backward_weight": (
            lambda: triton_diagonal.launch_backward_weight(dz, *gate[:3]),
            o,
            0,
        ),
    }
    rows = []
    for kernel, (call, columns, depth) in kernels.items():
        tile, once = choose_tile(kernel, dtype.itemsize, columns, depth)
        ours: Line = (kernel, dtype.itemsize, columns, tile.bk if once else None, tile)
        others = candidates(kernel, dtype.itemsize, columns, depth or batch)[:most]
        for line in (ours, *others):
            TILES.insert(0, line)  # the first line that fits is taken
            try:
                found = timed({kernel: call}, rounds, device)[kernel]
            except OutOfResources:
                continue
            finally:
                TILES.pop(0)
            rows.append({"line": line, "ms": 1e3 * min(found)})
    return rows


def winners(rows: list[dict[str, Any]]) -> list[str]:
    """The fastest tile of each kernel as a line for the tile table, with what the table's takes."""
    text = []
    for _, group in itertools.groupby(rows, key=lambda row: row["line"][0]):
        table_first = list(group)  # as `sweep` orders them
        best = min(table_first, key=lambda row: row["ms"])
        kernel, itemsize, columns, depth, tile = best["line"]
        sizes = f"Tile({tile.bm}, {tile.bn}, {tile.bk}, {tile.warps}, {tile.stages}"
        sizes += f", slices={tile.slices}" * (tile.slices > 1)
        sizes += f", registers={tile.registers}" * (tile.registers is not None)
        sizes += f", stages_before_hopper={tile.stages_before_hopper}" * bool(
            tile.stages_before_hopper
        )
        sizes += ")"
        text.append(
            f'    ("{kernel}", {itemsize}, {columns}, {depth}, {sizes}),'
            f"  # {best['ms']:.4f} ms; {table_first[0]['ms']:.4f} with the table's tile"
        )
    return text
