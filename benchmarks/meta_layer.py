"""The meta layer against the ways one would write it first, forward and forward + backward.

    OMP_NUM_THREADS=2 python -m benchmarks.meta_layer --out benchmarks/results/meta_layer.json
    python -m benchmarks.meta_layer --device cuda --dtype bfloat16 --out meta_layer_gpu.json
    python -m benchmarks.meta_layer --device cuda --dtype bfloat16 --tiles --out tiles.json

All forms run once per round, in turn, and ratios are taken round by round, so that a disturbance of
the machine hits all of them. A square product of the same run gives the machine's own peak.

On CUDA every form is captured several times over in a graph, and the graph is what is timed: a layer takes
tens of microseconds there, and to launch its kernels from Python takes longer. `--tiles` times the fused
kernels alone with every candidate tile and prints the lines for the tile table (trainer/ops/triton_tiles.py).
"""

import argparse
import functools
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from embeddings.measure import machine, summary
from trainer.ops import meta_linear
from trainer.ops.grouped import can_group_on_device
from trainer.profile_meta_layer import DTYPES, PEAK_SIZE, flops, interleaved

if TYPE_CHECKING:
    from trainer.ops.triton_tiles import Tile

SHAPES = {  # B, r, i, o
    "cpu": [(4096, 32, 128, 128), (4096, 16, 64, 64), (4096, 64, 256, 128)],
    "cuda": [(16384, 32, 128, 128), (16384, 32, 256, 256), (16384, 32, 512, 512)],
}
DISTINCT = (10, 100, 1000)
# Rows at a time of the reordered form: U then stays in a CPU's second cache, or a GPU's.
CHUNK = {"cpu": 256, "cuda": 4096}
SQUARE = {"cpu": PEAK_SIZE, "cuda": 8192}  # smaller ones do not reach a GPU's peak
CAPTURED = 10  # calls in a graph
NAIVE, PEAK, REFERENCE = "naive: W_b, bmm", "square product", "ours: reference"
COMPILED = ", compiled"
# As in the tile table: kernel, bytes per element, most columns, most depth, tile.
Line: TypeAlias = "tuple[str, int, int | None, int | None, Tile]"


def naive(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Generates every sample's matrix, then a batched product."""
    generated = (g @ weight[:-1].flatten(1)).view(-1, *weight.shape[1:]) + weight[-1]
    return torch.bmm(generated, h[:, :, None])[:, :, 0] + bias[-1] + g @ bias[:-1]


def einsum(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation as it stands."""
    product = torch.einsum("br,roi,bi->bo", g, weight[:-1], h)
    return product + h @ weight[-1].t() + bias[-1] + g @ bias[:-1]


def chunked(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """U = h A for all slices at once in one product, then the weighted sum; some rows at a time."""
    flat, parts, size = weight.flatten(0, 1).t(), [], CHUNK[h.device.type]
    gates = torch.cat([g, g.new_ones(len(g), 1)], dim=1)
    for start in range(0, len(h), size):
        u = (h[start : start + size] @ flat).view(-1, *weight.shape[:2])
        parts.append(torch.bmm(gates[start : start + size, None], u)[:, 0])
    return torch.cat(parts) + gates @ bias


def loop(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A loop over the slices, with the gradient that autograd makes of it."""
    y = torch.addmm(bias[-1], h, weight[-1].t()) + g @ bias[:-1]
    for j in range(g.shape[1]):
        y = y + g[:, j : j + 1] * (h @ weight[j].t())
    return y


def forms(inputs: list[Tensor]) -> dict[str, tuple[Callable[[], Tensor], list[Tensor], str, int]]:
    """Everything to time: the call, what to differentiate by, and what its FLOPs are counted as."""
    h, g, weight, bias = inputs
    found: dict[str, tuple[Callable[[], Tensor], list[Tensor], str, int]] = {}
    plain: dict[str, Callable[..., Tensor]] = {
        NAIVE: naive,
        "einsum": einsum,
        f"reorder, {CHUNK[h.device.type]} rows": chunked,
        "loop, autograd": loop,
    }
    if h.is_cuda:
        plain |= {name + COMPILED: torch.compile(one) for name, one in plain.items()}
        plain["ours: fused"] = functools.partial(meta_linear, strategy="fused")
    plain[REFERENCE] = functools.partial(meta_linear, strategy="reference")
    for name, function in plain.items():
        found[name] = (functools.partial(function, *inputs), inputs, "reference", 0)
    # Elsewhere on CUDA grouped reads sizes back from the device, which a graph cannot hold.
    grouped = not h.is_cuda or can_group_on_device(h.dtype, weight.shape[2], weight.shape[1])
    for distinct in DISTINCT if grouped else ():
        few = g[:distinct].detach().clone().requires_grad_()
        group = torch.randint(0, distinct, (len(h),), device=h.device)

        def call(few: Tensor = few, group: Tensor = group) -> Tensor:
            return meta_linear(h, few, weight, bias, group=group, strategy="grouped")

        found[f"ours: grouped, {distinct} keys"] = (
            call,
            [h, few, weight, bias],
            "grouped",
            distinct,
        )
    return found


def captured(call: Callable[[], Any], pool: Any) -> Callable[[], None]:
    """A CUDA graph of CAPTURED calls, as a call; graphs of one pool share their memory."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(CAPTURED):
            call()
    return graph.replay


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call per round, by name; on CUDA without the time that launching takes."""
    if device == "cpu":
        return interleaved(calls, rounds, device)
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, Callable[[], Any]] = {
        name: captured(call, pool) for name, call in calls.items()
    }
    seconds = interleaved(graphs, rounds, device)
    return {name: [one / CAPTURED for one in found] for name, found in seconds.items()}


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Most memory of CUDA that a call takes above what was there before it; None on a CPU."""
    if device == "cpu":
        return None
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    shape: tuple[int, int, int, int], rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row per form, as `rows_of` makes them, and a last one of the machine's peak."""
    batch, rank, i, o = shape
    torch.manual_seed(0)
    sizes = [(batch, i), (batch, rank), (rank + 1, o, i), (rank + 1, o)]
    inputs = [(torch.randn(*size) * i**-0.5).to(device, dtype).requires_grad_() for size in sizes]
    dy = torch.randn(batch, o).to(device, dtype)
    square = torch.randn(SQUARE[device], SQUARE[device]).to(device, dtype)
    product = torch.empty_like(square)
    calls: dict[str, Callable[[], Any]] = {PEAK: lambda: torch.mm(square, square, out=product)}
    arms = forms(inputs)
    for name, (call, by, _, _) in arms.items():
        calls[f"{name}|forward"] = torch.no_grad()(call)
        calls[f"{name}|step"] = lambda c=call, b=by: torch.autograd.grad(c(), b, dy)  # type: ignore[misc]
    # Before anything is timed: the graphs' memory would be in the way.
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    work = {
        name: flops(counted, *shape, distinct) for name, (_, _, counted, distinct) in arms.items()
    }
    return rows_of(work, timed(calls, rounds, device), peaks, SQUARE[device])


def rows_of(
    work: dict[str, int],
    seconds: dict[str, list[float]],
    peaks: dict[str, int | None],
    square: int,
) -> list[dict[str, Any]]:
    """What the measurements say of each form.

    Args:
        work: FLOPs of a form's forward pass.
        seconds: Per round, by "form|forward" and "form|step", and of PEAK.
        peaks: Bytes above the inputs, by the same names.
        square: Size of the product that PEAK is.

    Returns:
        A row per form: ms, times faster than naive and, where there is one, than the compiled library
        form that takes least, share of the peak, memory. A last row with the peak itself.
    """
    rows = []
    for name, counted in work.items():
        row: dict[str, Any] = {"form": name}
        for kind, passes in (("forward", 1), ("step", 3)):
            mine = seconds[f"{name}|{kind}"]
            ideal = [one / (2 * square**3) * passes * counted for one in seconds[PEAK]]
            ms = {key: 1e3 * value for key, value in summary(mine).items()}
            row[kind] = {
                "ms": ms,
                "gflops": passes * counted / ms["median"] / 1e6,
                "times_naive": _ratio(seconds[f"{NAIVE}|{kind}"], mine),
                "fraction_of_peak": _ratio(ideal, mine),
                "best_ms": 1e3 * min(mine),
                "peak_bytes": peaks[f"{name}|{kind}"],
            }
            library = [seconds[f"{one}|{kind}"] for one in work if one.endswith(COMPILED)]
            if library:
                row[kind]["times_compiled"] = _ratio(min(library, key=statistics.median), mine)
        rows.append(row)
    peak = [2 * square**3 / one / 1e9 for one in seconds[PEAK]]
    rows.append({"form": PEAK, "size": square, "gflops": summary(peak), "best_gflops": max(peak)})
    return rows


def _ratio(theirs: list[float], mine: list[float]) -> dict[str, float]:
    return summary([a / b for a, b in zip(theirs, mine, strict=True)])


def table(shape: tuple[int, int, int, int], dtype: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; columns that nothing was measured for are left out."""
    peak = rows[-1]["gflops"]
    columns = {"ms": "ms", "times_naive": "x naive"}
    if "times_compiled" in rows[0]["forward"]:
        columns["times_compiled"] = "x best compiled library form"
    columns["fraction_of_peak"] = "of peak"
    if rows[0]["forward"]["peak_bytes"] is not None:
        columns["peak_bytes"] = "MiB above inputs"
    heads = [
        f"{words} ms" if column == "ms" else columns[column]
        for words in ("forward", "forward + backward")
        for column in columns
    ]
    text = [
        f"B={shape[0]}, r={shape[1]}, {shape[2]} to {shape[3]}, {dtype}; "
        f"{PEAK} of {rows[-1]['size']}: {peak['median']:.0f} GFLOP/s "
        f"({peak['low']:.0f} to {peak['high']:.0f})",
        "",
        f"| form | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for row in rows[:-1]:
        cells = [
            _cell(column, row[kind][column]) for kind in ("forward", "step") for column in columns
        ]
        text.append(f"| {row['form']} | {' | '.join(cells)} |")
    return "\n".join(text)


def _cell(column: str, found: Any) -> str:
    if column == "peak_bytes":
        return f"{found / (1 << 20):,.0f}"
    if column == "fraction_of_peak":
        return f"{found['median']:.0%}"
    # A GPU's milliseconds are small.
    digits = 3 if column == "ms" and found["median"] < 1 else 1
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


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
    for bm, bn, bk, warps, stages in itertools.product(
        (64, 128), widths, depths, (4, 8), (2, 3, 4)
    ):
        once = kernel != "backward_weight" and bk >= depth  # the resident operand is loaded once
        staged = bk * (bn if once else bm + bn) * stages + (bm * bk if once else 0)
        if staged * itemsize <= 200 * 1024 and bm * bn <= 128 * 128:
            tile = Tile(bm, bn, bk, warps, stages)
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
    from trainer.ops.triton_tiles import TILES, choose_tile

    batch, rank, i, o = shape
    sizes = [(batch, i), (batch, rank), (rank + 1, o, i), (rank + 1, o), (batch, o)]
    h, g, weight, bias, dz = ((torch.randn(*one) * i**-0.5).to(device, dtype) for one in sizes)
    gate = (dz, g, bias, bias)  # h, g, weight, bias of diagonals
    kernels: dict[str, tuple[Callable[[], Any], int, int]] = {
        "forward": (lambda: triton_meta.fused_forward(h, g, weight, bias, "relu"), o, i),
        "backward_input": (lambda: triton_meta.launch_backward_input(dz, h, g, weight), i, o),
        "backward_weight": (lambda: triton_meta.launch_backward_weight(dz, h, g, weight), i, 0),
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
        sizes = f"Tile({tile.bm}, {tile.bn}, {tile.bk}, {tile.warps}, {tile.stages})"
        text.append(
            f'    ("{kernel}", {itemsize}, {columns}, {depth}, {sizes}),'
            f"  # {best['ms']:.4f} ms; {table_first[0]['ms']:.4f} with the table's tile"
        )
    return text


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the tables, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each form")
    parser.add_argument("--shapes", type=int, default=3, help="how many of the shapes")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tiles", action="store_true", help="time every candidate tile (CUDA)")
    options = parser.parse_args(arguments)
    if options.tiles and options.device != "cuda":
        parser.error("--tiles times the kernels of CUDA: add --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    report: dict[str, Any] = {
        "machine": machine(),
        "rounds": options.rounds,
        "dtype": options.dtype,
        "shapes": [],
    }
    print(report["machine"], end="\n\n")
    for shape in SHAPES[options.device][: options.shapes]:
        what = (shape, options.rounds, options.device, getattr(torch, options.dtype))
        if options.tiles:
            rows = sweep(*what)
            print(f"# {shape}, {options.dtype}", *winners(rows), sep="\n", end="\n\n", flush=True)
            rows = [row | {"line": [*row["line"][:-1], vars(row["line"][-1])]} for row in rows]
        else:
            rows = measure(*what)
            print(table(shape, options.dtype, rows), end="\n\n", flush=True)
        names = ("batch", "rank", "in_features", "out_features")
        report["shapes"].append(dict(zip(names, shape, strict=True)) | {"rows": rows})
    finish(report, options.out)


def finish(report: dict[str, Any], out: Path | None) -> None:
    """Adds and prints the load, and writes the report if a file is named; it appears whole, by rename."""
    report["load_after"] = os.getloadavg()[0]
    print("load after:", report["load_after"])
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)


if __name__ == "__main__":
    main()
