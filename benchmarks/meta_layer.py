"""The meta layer against the ways one would write it first, forward and forward + backward.

    OMP_NUM_THREADS=2 python -m benchmarks.meta_layer --out benchmarks/results/meta_layer.json
    python -m benchmarks.meta_layer --device cuda --dtype bfloat16 --out meta_layer_gpu.json
    python -m benchmarks.meta_layer --device cuda --dtype bfloat16 --tiles --out tiles.json

All forms run once per round, in turn, and ratios are taken round by round, so that a disturbance of
the machine hits all of them. A square product of the same run gives the machine's own peak.

On CUDA what is timed are graphs (benchmarks/layer_timing.py). `--tiles` times the fused kernels alone with
every candidate tile and prints the lines for the tile table (trainer/ops/triton_tiles.py).
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_tiles import sweep, winners
from benchmarks.layer_timing import begin, finish, peak_bytes, timed
from embeddings.profiling.measure import summary
from trainer.ops import meta_linear
from trainer.ops.grouped import can_group_on_device
from trainer.profiling.meta_layer import DTYPES, PEAK_SIZE, flops

SHAPES = {  # B, r, i, o
    "cpu": [(4096, 32, 128, 128), (4096, 16, 64, 64), (4096, 64, 256, 128)],
    "cuda": [(16384, 32, 128, 128), (16384, 32, 256, 256), (16384, 32, 512, 512)],
}
DISTINCT = (10, 100, 1000)
CHUNK = 256  # rows at a time of the reordered form on a CPU: U then stays in its second cache
# On a GPU U shall take no more than half of an H100's or H200's 50 MB of L2.
MOST_OF_L2 = 25 << 20
SQUARE = {"cpu": PEAK_SIZE, "cuda": 8192}  # smaller ones do not reach a GPU's peak
NAIVE, PEAK, REFERENCE = "naive: W_b, bmm", "square product", "ours: reference"
OUTER = "outer product, one GEMM"
COMPILED = ", compiled"


def naive(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Generates every sample's matrix, then a batched product."""
    generated = (g @ weight[:-1].flatten(1)).view(-1, *weight.shape[1:]) + weight[-1]
    return torch.bmm(generated, h[:, :, None])[:, :, 0] + bias[-1] + g @ bias[:-1]


def einsum(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation as it stands."""
    product = torch.einsum("br,roi,bi->bo", g, weight[:-1], h)
    return product + h @ weight[-1].t() + bias[-1] + g @ bias[:-1]


def outer(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product of g~ and h, [B, (r+1) i], is stored; then one product of matrices is all."""
    gates = torch.cat([g, g.new_ones(len(g), 1)], dim=1)
    products = (gates[:, :, None] * h[:, None, :]).flatten(1)
    return torch.addmm(gates @ bias, products, weight.transpose(1, 2).flatten(0, 1))


def rows_of_a_chunk(weight: Tensor) -> int:
    """Rows whose U [rows, r+1, o] stays in the cache; on a GPU a multiple of 128."""
    if weight.device.type == "cpu":
        return CHUNK
    row = weight.shape[0] * weight.shape[1] * weight.element_size()
    return max(128, MOST_OF_L2 // row // 128 * 128)


def chunked(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """U = h A for all slices at once in one product, then the weighted sum; some rows at a time."""
    flat, parts, size = weight.flatten(0, 1).t(), [], rows_of_a_chunk(weight)
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
        OUTER: outer,
        f"reorder, {rows_of_a_chunk(weight)} rows": chunked,
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
        A row per form: ms, times faster than naive and, where there is one, than the library form
        that takes least, share of the peak, memory. A last row with the peak itself.
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
            if library and OUTER in work:  # a library call all but the copy, compiled or not
                library.append(seconds[f"{OUTER}|{kind}"])
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
        columns["times_compiled"] = "x best library form"
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
    report = begin(options.rounds, options.dtype)
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


if __name__ == "__main__":
    main()
