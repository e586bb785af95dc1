"""A profile of embeddings for people: a table, and plots."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from embeddings.profiling.phases import PHASES

BASELINES = {"embedding_bag": "nn.EmbeddingBag", "fbgemm": "bare FBGEMM"}


def text_of(report: dict[str, Any]) -> str:
    """The report as text."""
    machine = report["machine"]
    releases = f"torch {machine['torch']}, torchrec {report['versions'].get('torchrec')}"
    lines = [
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, {report['ranks']} ranks, "
        f"{releases}, load {machine['load']:.1f}",
        f"memory: {report['copy_bandwidth'] / 1e9:.1f} GB/s in a copy; {report['rounds']} rounds after "
        f"{report['warmup']} for warmth; median (quartiles), slowest rank",
    ]
    if machine["load"] > machine["threads"] * report["ranks"] + 0.5:
        lines.append("the machine is busy with something else: repeat when it is idle")
    for cell in report["cells"]:
        lines += ["", cell["name"], *_cell(cell)]
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> list[str]:
    if "impossible" in cell:
        return [f"  impossible: {cell['impossible']}"]
    lines = []
    if "wrong" in cell:
        lines += [f"  WRONG: {line}" for line in cell["wrong"]] or [
            "  correct: outputs and updated rows equal those of unsharded tables"
        ]
    phases = [
        [
            name,
            _spread(phase["ms"]),
            _milliseconds(phase.get("data_sheet_ms")),
            f"{phase['memory_bytes'] / 1e6:.2f}",
            f"{phase['share_of_copy_bandwidth']:.0%}",
            f"{phase['share_of_gather_bandwidth']:.0%}",
            f"{phase['link_bytes'] / 1e6:.2f}",
            _share(phase["share_of_link_bandwidth"]),
        ]
        for name, phase in cell["phases"].items()
        if name in PHASES
    ]
    head = [
        "phase",
        "ms",
        "by data sheet",
        "memory MB",
        "of copy",
        "of gather",
        "link MB",
        "of link",
    ]
    lines += _table(phases, head).splitlines()
    part = cell["sum_of_phases_over_step"]["time"]["median"]
    rate, forward = cell["samples_per_second"], cell["forward"]["ms"]["median"]
    whole = [
        ["sum of phases", _spread(cell["sum_of_phases"]["ms"]), f"{part:.2f} of the step"],
        [
            "whole step",
            _spread(cell["step"]["ms"]),
            f"{rate:,.0f} samples/s, forward {forward:.2f} ms",
        ],
    ]
    for name, baseline in cell["baselines"].items():
        faster = baseline["step_over_sharded"]
        note = (
            "" if baseline["rule"] == cell["rule"] else f", with {baseline['rule']}: another rule"
        )
        whole.append(
            [
                BASELINES[name],
                _spread(baseline["step"]["ms"]),
                f"{_spread(faster['time'])} of the sharded step's time, "
                f"{_spread(faster['processor_time'])} of its processor time{note}",
            ]
        )
    return [*lines, *_table(whole).splitlines()]


def _table(rows: list[list[str]], head: Sequence[str] = ()) -> str:
    """Rows under each other, indented; what follows the first column to the right, words to the left."""
    aligned = ["right"] * (len(rows[0]) - 1) if head else ["right", "left"]
    table = tabulate(
        rows, head, tablefmt="plain", disable_numparse=True, colalign=("left", *aligned)
    )
    return textwrap.indent(table, "  ")


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def _milliseconds(value: float | None) -> str:
    """What a phase would take that waits for its bytes alone, at the data sheet's rate."""
    return "" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes phases.png (where a step's time goes) and baselines.png (against the alternatives).

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    cells = [cell for cell in report["cells"] if "impossible" not in cell]
    names = [cell["name"].replace(", batch", ",\nbatch", 1) for cell in cells]
    height = 1.5 + 0.55 * len(cells)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(cells)
    for phase in PHASES:
        widths = [cell["phases"].get(phase, {}).get("ms", {}).get("median", 0.0) for cell in cells]
        axes.barh(names, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    whole = [cell["step"]["ms"]["median"] for cell in cells]
    axes.plot(whole, names, "k|", markersize=14, label="whole step")
    _finish(axes, "ms per step (median)")
    other = Figure(figsize=(11, height), layout="constrained")
    axes = other.subplots()
    arms = {"sharded": lambda cell: cell["step"]} | {
        name: lambda cell, key=key: cell["baselines"].get(key, {}).get("step")
        for key, name in BASELINES.items()
    }
    for arm, (name, pick) in enumerate(arms.items()):
        points = [(row, step["ms"]) for row, cell in enumerate(cells) if (step := pick(cell))]
        axes.barh(
            [row + 0.27 * (arm - 1) for row, _ in points],
            [ms["median"] for _, ms in points],
            0.25,
            xerr=[
                [ms["median"] - ms["low"] for _, ms in points],
                [ms["high"] - ms["median"] for _, ms in points],
            ],
            label=name,
        )
    axes.set_yticks(range(len(cells)), names)
    _finish(axes, "ms per step (median, quartiles)")
    files = [folder / "phases.png", folder / "baselines.png"]
    for drawing, file in zip((figure, other), files, strict=True):
        drawing.savefig(file, dpi=120)
    return files


def _finish(axes: Any, label: str) -> None:
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
