"""The meta layer against the ways one would write it first, forward and forward + backward.

    OMP_NUM_THREADS=2 python -m benchmarks.meta_layer --out benchmarks/results/meta_layer.json
    python -m benchmarks.meta_layer --device cuda --dtype bfloat16 --out meta_layer_gpu.json

All forms run once per round, in turn, and ratios are taken round by round, so that a disturbance of
the machine hits all of them. A square product of the same run gives the machine's own peak.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embeddings.measure import machine, summary
from trainer.ops import meta_linear
from trainer.profile_meta_layer import DTYPES, PEAK_SIZE, flops, interleaved

SHAPES = {  # B, r, i, o
    "cpu": [(4096, 32, 128, 128), (4096, 16, 64, 64), (4096, 64, 256, 128)],
    "cuda": [(16384, 32, 128, 128), (16384, 32, 256, 256), (16384, 32, 512, 512)],
}
DISTINCT = (10, 100, 1000)
CHUNK = 256
NAIVE, PEAK, REFERENCE = "naive: W_b, bmm", "square product", "ours: reference"


def naive(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Generates every sample's matrix, then a batched product."""
    generated = (g @ weight[:-1].flatten(1)).view(-1, *weight.shape[1:]) + weight[-1]
    return torch.bmm(generated, h[:, :, None])[:, :, 0] + bias[-1] + g @ bias[:-1]


def einsum(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation as it stands."""
    product = torch.einsum("br,roi,bi->bo", g, weight[:-1], h)
    return product + h @ weight[-1].t() + bias[-1] + g @ bias[:-1]


def chunked(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """U = h A for all slices at once in one product, then the weighted sum; 256 rows at a time."""
    flat, parts = weight.flatten(0, 1).t(), []
    gates = torch.cat([g, g.new_ones(len(g), 1)], dim=1)
    for start in range(0, len(h), CHUNK):
        u = (h[start : start + CHUNK] @ flat).view(-1, *weight.shape[:2])
        parts.append(torch.bmm(gates[start : start + CHUNK, None], u)[:, 0])
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
        "reorder, 256 rows": chunked,
        "loop, autograd": loop,
    }
    if h.is_cuda:
        plain |= {
            f"{name}, compiled": torch.compile(plain[name])
            for name in ("reorder, 256 rows", "loop, autograd")
        }
        plain["ours: fused"] = functools.partial(meta_linear, strategy="fused")
    plain[REFERENCE] = functools.partial(meta_linear, strategy="reference")
    for name, function in plain.items():
        found[name] = (functools.partial(function, *inputs), inputs, "reference", 0)
    for distinct in DISTINCT:
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
    """One row per form: ms, times faster than naive, and GFLOP/s as a share of the peak."""
    batch, rank, i, o = shape
    torch.manual_seed(0)
    sizes = [(batch, i), (batch, rank), (rank + 1, o, i), (rank + 1, o)]
    inputs = [(torch.randn(*size) * i**-0.5).to(device, dtype).requires_grad_() for size in sizes]
    dy = torch.randn(batch, o).to(device, dtype)
    square = torch.randn(PEAK_SIZE, PEAK_SIZE).to(device, dtype)
    product = torch.empty_like(square)
    calls: dict[str, Callable[[], Any]] = {PEAK: lambda: torch.mm(square, square, out=product)}
    arms = forms(inputs)
    for name, (call, by, _, _) in arms.items():
        calls[f"{name}|forward"] = torch.no_grad()(call)
        calls[f"{name}|step"] = lambda c=call, b=by: torch.autograd.grad(c(), b, dy)  # type: ignore[misc]
    seconds = interleaved(calls, rounds, device)
    rows = []
    for name, (_, _, counted, distinct) in arms.items():
        row: dict[str, Any] = {"form": name}
        for kind, times in (("forward", 1), ("step", 3)):
            mine, theirs = seconds[f"{name}|{kind}"], seconds[f"{NAIVE}|{kind}"]
            work = times * flops(counted, *shape, distinct)
            ideal = [one / (2 * PEAK_SIZE**3) * work for one in seconds[PEAK]]
            row[kind] = {
                "ms": {key: 1e3 * value for key, value in summary(mine).items()},
                "times_naive": summary([a / b for a, b in zip(theirs, mine, strict=True)]),
                "fraction_of_peak": summary([a / b for a, b in zip(ideal, mine, strict=True)]),
                "best_ms": 1e3 * min(mine),
            }
        rows.append(row)
    peak = [2 * PEAK_SIZE**3 / one / 1e9 for one in seconds[PEAK]]
    rows.append({"form": PEAK, "gflops": summary(peak), "best_gflops": max(peak)})
    return rows


def table(shape: tuple[int, int, int, int], dtype: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    peak = rows[-1]["gflops"]
    text = [
        f"B={shape[0]}, r={shape[1]}, {shape[2]} to {shape[3]}, {dtype}; "
        f"{PEAK} of {PEAK_SIZE}: {peak['median']:.0f} GFLOP/s "
        f"({peak['low']:.0f} to {peak['high']:.0f})",
        "",
        "| form | forward ms | x naive | of peak | forward + backward ms | x naive | of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows[:-1]:
        cells = []
        for kind in ("forward", "step"):
            ms, times = row[kind]["ms"], row[kind]["times_naive"]
            cells += [
                f"{ms['median']:.1f} ({ms['low']:.1f} to {ms['high']:.1f})",
                f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})",
                f"{row[kind]['fraction_of_peak']['median']:.0%}",
            ]
        text.append(f"| {row['form']} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    """Measures, prints the tables, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each form")
    parser.add_argument("--shapes", type=int, default=3, help="how many of the shapes")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(),
        "rounds": options.rounds,
        "dtype": options.dtype,
        "shapes": [],
    }
    print(report["machine"], end="\n\n")
    for shape in SHAPES[options.device][: options.shapes]:
        rows = measure(shape, options.rounds, options.device, getattr(torch, options.dtype))
        print(table(shape, options.dtype, rows), end="\n\n", flush=True)
        names = ("batch", "rank", "in_features", "out_features")
        report["shapes"].append(dict(zip(names, shape, strict=True)) | {"rows": rows})
    report["load_after"] = os.getloadavg()[0]
    print("load after:", report["load_after"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.out)


if __name__ == "__main__":
    main()
