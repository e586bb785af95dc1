"""The meta layer with diagonal slices, which is what a gate is made of, against library forms of it.

    OMP_NUM_THREADS=1 python -m benchmarks.diagonal_layer --out benchmarks/results/diagonal_layer.json
    python -m benchmarks.diagonal_layer --device cuda --dtype bfloat16 --out diagonal_layer_gpu.json

Only y_b = relu(s(g_b) * h_b + c(g_b)) is timed, not the gate's shared matrix. All forms run once per
round, in turn; ratios are taken round by round. On CUDA what is timed are graphs
(benchmarks/layer_timing.py). The layer is bound by memory: "GB/s" is what it has to read and write, h and y
forward, h, dz and dh once each backward besides, over the time it took.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer_timing import begin, finish, peak_bytes, timed
from benchmarks.meta_layer import COMPILED
from embeddings.profiling.measure import summary
from trainer.ops import meta_linear
from trainer.profiling.meta_layer import DTYPES

SHAPES = {  # B, r, o
    "cpu": [(1024, 8, 96), (4096, 32, 128), (4096, 32, 512)],
    "cuda": [(16384, 8, 128), (16384, 32, 256), (65536, 32, 512)],
}
DISTINCT = (3, 100)
LIBRARY = "library: two products, times, plus"


def library(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation as it stands."""
    scales, biases = (F.linear(g, one[:-1].t(), one[-1]) for one in (weight, bias))
    return torch.relu(scales * h + biases)


def shared(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor, strategy: str
) -> Tensor:
    """The same with a knowledge row for many samples."""
    return meta_linear(h, g, weight, bias, group=group, activation="relu", strategy=strategy)


def forms(inputs: list[Tensor]) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Everything to time, by name: the call, and what it is called with and differentiated by."""
    h, g, weight, bias = inputs
    own = "fused" if h.is_cuda else "reference"
    found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {LIBRARY: (library, inputs)}
    if h.is_cuda:
        found[LIBRARY + COMPILED] = (torch.compile(library), inputs)
    call = functools.partial(meta_linear, activation="relu", strategy=own)
    found[f"ours: {own}"] = (call, inputs)
    for distinct in DISTINCT:
        few = g[:distinct].detach().clone().requires_grad_()
        group = torch.randint(0, distinct, (len(h),), device=h.device)
        for strategy in (own, "grouped"):
            call = functools.partial(shared, group=group, strategy=strategy)
            found[f"ours: {strategy}, {distinct} keys"] = (call, [h, few, weight, bias])
    return found


def measure(
    shape: tuple[int, int, int], rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row per form: ms, times faster than the library form, GB/s, memory above the inputs."""
    batch, rank, width = shape
    torch.manual_seed(0)
    sizes = [(batch, width), (batch, rank), (rank + 1, width), (rank + 1, width)]
    inputs = [torch.randn(*size).to(device, dtype).requires_grad_() for size in sizes]
    dy = torch.randn(batch, width).to(device, dtype)
    arms = forms(inputs)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (call, by) in arms.items():
        forward = functools.partial(call, *by)
        calls[f"{name}|forward"] = torch.no_grad()(forward)
        calls[f"{name}|step"] = lambda c=forward, b=by: torch.autograd.grad(c(), b, dy)  # type: ignore[misc]
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    seconds = timed(calls, rounds, device)
    rows = []
    for name in arms:
        row: dict[str, Any] = {"form": name}
        for kind, arrays in (("forward", 2), ("step", 5)):
            mine, theirs = seconds[f"{name}|{kind}"], seconds[f"{LIBRARY}|{kind}"]
            moved = arrays * batch * width * dtype.itemsize
            row[kind] = {
                "ms": summary([1e3 * one for one in mine]),
                "times_library": summary([a / b for a, b in zip(theirs, mine, strict=True)]),
                "gb_per_second": moved / statistics.median(mine) / 1e9,
                "peak_bytes": peaks[f"{name}|{kind}"],
            }
        rows.append(row)
    return rows


def table(shape: tuple[int, int, int], dtype: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ["ms", "x library", "GB/s"]
    if rows[0]["step"]["peak_bytes"] is not None:
        heads.append("MiB above inputs")
    columns = [f"{kind} {head}" for kind in ("forward", "forward + backward") for head in heads]
    text = [
        "B={:,}, r={}, width {}, {}".format(*shape, dtype),
        "",
        f"| form | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for kind in ("forward", "step"):
            found = row[kind]
            cells += [
                "{median:.3f} ({low:.3f} to {high:.3f})".format(**found["ms"]),
                "{median:.2f} ({low:.2f} to {high:.2f})".format(**found["times_library"]),
                f"{found['gb_per_second']:.1f}",
            ]
            if found["peak_bytes"] is not None:
                cells.append(f"{found['peak_bytes'] / (1 << 20):,.0f}")
        text.append(f"| {row['form']} | {' | '.join(cells)} |")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the tables, writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=31, help="measurements of each form")
    parser.add_argument("--shapes", type=int, default=3, help="how many of the shapes")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    report = begin(options.rounds, options.dtype)
    for shape in SHAPES[options.device][: options.shapes]:
        rows = measure(shape, options.rounds, options.device, getattr(torch, options.dtype))
        print(table(shape, options.dtype, rows), end="\n\n", flush=True)
        names = ("batch", "rank", "width")
        report["shapes"].append(dict(zip(names, shape, strict=True)) | {"rows": rows})
    finish(report, options.out)


if __name__ == "__main__":
    main()
