"""How long a meta layer of the user's own shape takes, which strategy it gets, how near it is to peak.

python -m trainer.profiling.meta_layer --batch 4096 --rank 32 --in-features 128 --out-features 128
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from trainer.models.meta import MetaLayer

PEAK_SIZE = 2048  # of the square product that stands for the machine's peak
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("low_rank", "core", "gate")


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Times every call once per round, so that whatever disturbs the machine disturbs all alike.

    Args:
        calls: What to time, by name. Each runs twice beforehand.
        rounds: Measurements of each.
        device: "cuda" is synchronised around every call.

    Returns:
        Seconds per round, by name. Ratios are best taken round by round.
    """
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for call in list(calls.values()) * 2:
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            began = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def flops(
    strategy: str, batch: int, rank: int, in_features: int, out_features: int, distinct: int
) -> int:
    """Floating-point operations of one forward pass; forward and backward together take three times."""
    layer = 2 * in_features * out_features
    if strategy == "grouped":
        return layer * (batch + distinct * (rank + 1))
    return layer * batch * (rank + 1)


def _work(
    kind: str,
    strategy: str,
    shape: tuple[int, int, int, int],
    distinct: int | None,
    core_width: int,
) -> int:
    """The same of a layer of any kind."""
    batch, rank, in_features, out_features = shape
    if kind == "gate":
        generated = (distinct or batch) if strategy == "grouped" else batch
        return 2 * out_features * (batch * in_features + 2 * rank * generated)
    if kind == "core":
        core = flops(strategy, batch, rank, core_width, core_width, distinct or 0)
        return 2 * batch * core_width * (in_features + out_features) + core
    return flops(strategy, *shape, distinct or 0)


def profile_meta_layer(
    batch: int,
    rank: int,
    in_features: int,
    out_features: int,
    distinct: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    kind: str = "low_rank",
    core_width: int = 16,
    strategy: str = "auto",
    rounds: int = 9,
) -> dict[str, Any]:
    """Times forward, and forward with backward, of one meta layer on random numbers.

    Args:
        batch: Samples B.
        rank: Width r of the knowledge vectors.
        in_features: Width i.
        out_features: Width o.
        distinct: Distinct knowledge rows S that the samples share; None: every sample has its own.
        dtype: One of DTYPES.
        device: "cpu" or "cuda".
        kind: One of KINDS: what is generated, as `model.meta.kind`.
        core_width: Width of the generated matrix of kind core.
        strategy: Of the op; "auto" is what training takes.
        rounds: Measurements; median and quartiles are reported.

    Returns:
        "explanation" (a line with the strategy and why), "strategy", "forward"
        and "step" (each with "median", "low", "high" in ms, "gflops" per second, "fraction_of_peak"),
        "peak_gflops" of a square product in the same run, "machine".

    Raises:
        InputError: If a number, the dtype, the device, the kind or the strategy is impossible here.
    """
    import torch

    from embeddings.profiling.measure import machine
    from trainer.models.meta import Generator, MetaLayer

    sizes = (batch, rank, in_features, out_features, core_width, rounds - 1, distinct or batch)
    _check(sizes, distinct, dtype, device, kind, strategy)
    element = getattr(torch, dtype)
    shape = (batch, rank, in_features, out_features)
    generator = Generator(rank, kind, core_width, residual=False, strategy=strategy)
    layer = MetaLayer(in_features, out_features, generator).to(device, element)
    seconds = interleaved(_calls(layer, shape, distinct, element, device), rounds, device)
    peak = 2 * PEAK_SIZE**3 / statistics.median(seconds["peak"]) / 1e9
    taken = _strategy_taken(strategy, shape, distinct, element, device, kind, core_width)
    work = _work(kind, taken, shape, distinct, core_width)
    return {
        "explanation": layer.explain(batch, distinct, device, element),
        "strategy": taken,
        "peak_gflops": peak,
        "machine": machine(),
        "forward": _speed(seconds["forward"], work, peak),
        "step": _speed(seconds["step"], 3 * work, peak),
    }


def _speed(seconds: list[float], work: int, peak: float) -> dict[str, float]:
    """Times in ms, and what they mean for so many operations."""
    from embeddings.profiling.measure import summary

    milliseconds = {key: value * 1e3 for key, value in summary(seconds).items()}
    gflops = work / milliseconds["median"] / 1e6
    return milliseconds | {"gflops": gflops, "fraction_of_peak": gflops / peak}


def _strategy_taken(
    strategy: str,
    shape: tuple[int, int, int, int],
    distinct: int | None,
    dtype: "torch.dtype",
    device: str,
    kind: str,
    core_width: int,
) -> str:
    """What the op computes by, "auto" being its own choice."""
    from trainer.ops import choose_strategy

    if strategy != "auto":
        return strategy
    generated = (*shape[:2], core_width, core_width) if kind == "core" else shape
    chosen, _ = choose_strategy(
        *generated, groups=distinct, device=device, dtype=dtype, diagonal=kind == "gate"
    )
    return chosen


def _check(
    sizes: Sequence[int],
    distinct: int | None,
    dtype: str,
    device: str,
    kind: str,
    strategy: str,
) -> None:
    """Refuses what cannot be measured here.

    Raises:
        InputError: Names it and what is possible.
    """
    import torch

    from llm_knowledge.errors import InputError

    if min(sizes) < 1 or distinct == 0:
        raise InputError("profile meta-layer: sizes must be at least 1, and rounds at least 2")
    if dtype not in DTYPES:
        raise InputError(f"profile meta-layer: dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if kind not in KINDS:
        raise InputError(f"profile meta-layer: kind {kind!r}; use one of {', '.join(KINDS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("profile meta-layer: no CUDA device here; use --device cpu")
    if strategy == "grouped" and distinct is None:
        raise InputError("profile meta-layer: strategy grouped needs --distinct")


def _calls(
    layer: "MetaLayer",
    shape: tuple[int, int, int, int],
    distinct: int | None,
    dtype: "torch.dtype",
    device: str,
) -> dict[str, Callable[[], Any]]:
    """What is timed, on random numbers: a square product, the layer forward, and with its backward.

    Raises:
        InputError: The layer's strategy cannot compute this.
    """
    import torch

    from llm_knowledge.errors import InputError

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    batch, rank, in_features, out_features = shape
    group = None if distinct is None else torch.arange(batch, device=device) % distinct
    rows = batch if distinct is None else distinct
    h, g = (random(*sizes).requires_grad_() for sizes in ((batch, in_features), (rows, rank)))
    inputs = [h, g, *layer.parameters()]
    dy, square = random(batch, out_features), random(PEAK_SIZE, PEAK_SIZE)

    def forward() -> torch.Tensor:
        return layer(h, g, group, activation="relu")

    try:
        forward()
    except ValueError as error:
        raise InputError(f"profile meta-layer: {error}") from None
    return {
        "peak": lambda: square @ square,
        "forward": torch.no_grad()(forward),
        "step": lambda: torch.autograd.grad(forward(), inputs, dy),
    }


def text_of(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [report["explanation"]]
    for name, words in (("forward", "forward"), ("step", "forward + backward")):
        timing = report[name]
        lines.append(
            f"{words}: {timing['median']:.2f} ms (quartiles {timing['low']:.2f} to {timing['high']:.2f}), "
            f"{timing['gflops']:,.0f} GFLOP/s, {timing['fraction_of_peak']:.0%} of peak"
        )
    what = report["machine"]
    lines.append(
        f"peak: {report['peak_gflops']:,.0f} GFLOP/s, a product of {PEAK_SIZE} x {PEAK_SIZE}, same run"
    )
    lines.append(
        f"{what['gpu'] or what['processor']}, {what['threads']} threads, torch {what['torch']}, "
        f"load {what['load']:.1f}"
    )
    if what["load"] > what["threads"] + 0.5:
        lines.append("the machine is busy with something else: repeat when it is idle")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--batch", type=int, default=4096, help="samples (default 4096)")
    parser.add_argument("--rank", type=int, default=32, help="width of the knowledge vectors")
    parser.add_argument("--in-features", type=int, default=128, help="width of the input")
    parser.add_argument("--out-features", type=int, default=128, help="width of the output")
    parser.add_argument(
        "--distinct", type=int, help="knowledge rows that the samples share (default: one each)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the numbers")
    parser.add_argument(
        "--kind", choices=KINDS, default="low_rank", help="what is generated (model.meta.kind)"
    )
    parser.add_argument("--core-width", type=int, default=16, help="of kind core (default 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument(
        "--strategy",
        choices=("auto", "fused", "grouped", "reference", "warp_specialised"),
        default="auto",
        help="of the op (default: what training takes)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="measurements (default 9)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(options: argparse.Namespace) -> None:
    """Profiles and prints."""
    report = profile_meta_layer(
        options.batch,
        options.rank,
        options.in_features,
        options.out_features,
        options.distinct,
        options.dtype,
        options.device,
        kind=options.kind,
        core_width=options.core_width,
        strategy=options.strategy,
        rounds=options.rounds,
    )
    print(json.dumps(report, indent=2) if options.json else text_of(report))


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    main(_parser.parse_args())
