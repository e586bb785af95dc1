"""Bytes that the fused kernels move, by formula, and the share of a GPU's peak that this leaves.

Through L2 goes what a program's loads and stores ask for, whoever asked before; through memory what every
array holds, once. Nobody has measured either: the formula is held to a count by Triton's interpreter.
"""

from typing import NamedTuple

from embeddings.profiling.measure import MEMORY_BANDWIDTH
from trainer.ops.triton_tiles import choose_tile, share_of_batch, slices_of_a_part

# H100 and H200 (SXM), dense bfloat16. The bandwidth of L2 is nowhere in NVIDIA's data sheets; 5.5 TB/s
# is what microbenchmarks of an H100 report for reads.
PEAK, L2, MULTIPROCESSORS = 989e12, 5.5e12, 132


class Traffic(NamedTuple):
    """Of one launch: operations of tensor cores, and bytes."""

    flops: int
    l2: int
    memory: int
    programs: int

    @property
    def flops_per_l2_byte(self) -> float:
        """What is multiplied and added for every byte through L2."""
        return self.flops / self.l2

    def bound(self, gpu: str = "H200") -> float:
        """Most of the peak that a kernel can reach which waits for nothing but these bytes."""
        seconds = max(self.flops / PEAK, self.l2 / L2, self.memory / MEMORY_BANDWIDTH[gpu])
        return self.flops / PEAK / seconds


def _up(number: int, other: int) -> int:
    return -(-number // other)


def traffic(
    kernel: str,
    rows: int,
    rank: int,
    i: int,
    o: int,
    *,
    itemsize: int = 2,
    processors: int = MULTIPROCESSORS,
) -> Traffic:
    """Counts a launch of `kernel` as the launchers make it, its sum of parts or shares included.

    Args:
        kernel: "forward", "backward_input" or "backward_weight".
        rows: Samples B.
        rank: Width r of the knowledge vectors.
        i: Width of the inputs, a multiple of 16.
        o: Width of the outputs, a multiple of 16.
        itemsize: Bytes per element, 2 or 4.
        processors: Of the GPU.

    Returns:
        Operations and bytes. The bytes through L2 are those inside the arrays: what a tile's mask
        leaves out is not loaded.
    """
    slices = rank + 1
    flops = 2 * rows * slices * i * o
    gates, weight, x, z = 4 * slices * rows, slices * i * o, rows * i, rows * o
    if kernel == "backward_weight":
        return _traffic_of_weights(rows, slices, i, o, itemsize, processors)
    columns, depth = (o, i) if kernel == "forward" else (i, o)
    tile, one_k = choose_tile(kernel, itemsize, columns, depth)
    down, across = _up(rows, tile.bm), _up(columns, tile.bn)
    per_part = slices_of_a_part(processors, down * across, slices)
    parts = _up(slices, per_part)
    resident = x if kernel == "forward" else z
    result = rows * columns
    written = result * (itemsize if parts == 1 else 4) * parts
    added = 0 if parts == 1 else written + itemsize * result
    moved = itemsize * (resident * across * (parts if one_k else slices) + weight * down)
    moved += gates * across + written + added
    memory = (
        itemsize * (x + z + weight + slices * o) + gates + (written + added - itemsize * result)
    )
    if kernel == "forward":  # a product of its own reads gates and biases
        moved += gates * across + itemsize * slices * o * down
        return Traffic(flops, moved, memory, down * across * parts)
    shares_of_dg = 4 * rank * rows * (across + 1)
    moved += itemsize * (x * parts + rank * o * down) + shares_of_dg
    if not one_k:  # programs of the first columns multiply dz by the biases, some slices at a time
        ends = range(0, slices, per_part)
        moved += itemsize * z * sum(_up(min(per_part, slices - j), 32) for j in ends)
    return Traffic(flops, moved, memory + itemsize * x + shares_of_dg, down * across * parts)


def _traffic_of_weights(
    rows: int, slices: int, i: int, o: int, itemsize: int, processors: int
) -> Traffic:
    """Counts "backward_weight", whose programs hold several slices each."""
    gates, weight, x, z = 4 * slices * rows, slices * i * o, rows * i, rows * o
    tile, _ = choose_tile("backward_weight", itemsize, i, 0)
    across, along, groups = _up(i, tile.bn), _up(o, tile.bm), _up(slices, tile.slices)
    programs = across * along * groups
    shares = _up(rows, share_of_batch(processors, programs, rows, max(i, o), tile.bk))
    # Where their number is odd, the last group reads its only slice's gates twice.
    gates_read = 4 * rows * tile.slices * groups * across * along
    once = itemsize * (z * across + x * along) * groups + gates_read
    partial = weight * (itemsize if shares == 1 else 4) * shares
    added = 0 if shares == 1 else partial + itemsize * weight
    memory = itemsize * (x + z + weight) + gates + (partial + added - itemsize * weight)
    flops = 2 * rows * slices * i * o
    return Traffic(flops, once + partial + added, memory, programs * shares)
