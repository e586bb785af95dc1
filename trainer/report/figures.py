"""Pictures of the report as PNG bytes; no display, no global matplotlib state."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ["#3b6fb6", "#d1773c", "#4a9a62", "#a9508f", "#8a7a3d", "#5aa7b5", "#b5485a", "#6b6b9e"]
_GREY = "#b8bcc4"


def _text(value: Any, limit: int = 40) -> str:
    """A label for matplotlib: short, printable, without its formula language."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(width, height), dpi=170, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#9aa0aa")
        axis.tick_params(labelsize=8, colors="#444a55")
        axis.grid(True, color="#eceef2", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def read_curve(run: Path, field: str, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Reads one number over steps from RUN/metrics.jsonl.

    Args:
        run: Run directory.
        field: For example "loss" or "valid_auc".
        kinds: Accepted values of "kind".

    Returns:
        Steps int64 [n] and values float64 [n]; empty when there is nothing. A line that a killed
        run left unfinished and values that are not finite are skipped.
    """
    points: dict[int, float] = {}
    file = run / "metrics.jsonl"
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                step, value = int(entry["step"]), float(entry[field])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
            if entry.get("kind") in kinds and np.isfinite(value):
                points[step] = value  # after a resume the later line for a step is the true one
    steps = np.array(sorted(points), np.int64)
    return steps, np.array([points[step] for step in steps.tolist()], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over at most a twentieth of the points (a single step's loss is noisy)."""
    width = max(1, len(values) // 20)
    total = np.cumsum(np.r_[0.0, values])
    start = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    stop = np.arange(1, len(values) + 1)
    return (total[stop] - total[start]) / (stop - start)


def curves(arms: list[tuple[str, str, list[Path]]]) -> bytes | None:
    """Training loss and validation AUC over steps; one row of panels per backbone.

    Args:
        arms: (name, backbone, run directories).

    Returns:
        PNG bytes, or None when no run has a curve.
    """
    backbones = list(dict.fromkeys(backbone for _, backbone, _ in arms))
    figure, axes = _figure(9.4, 2.9 * len(backbones), len(backbones), 2)
    drawn = 0
    for row, backbone in enumerate(backbones):
        members = [(name, runs) for name, of, runs in arms if of == backbone]
        for number, (name, runs) in enumerate(members):
            colour = COLOURS[number % len(COLOURS)]
            for seed, run in enumerate(runs):
                label = _text(name) if seed == 0 else None
                loss = read_curve(run, "loss", ("train",))
                auc = read_curve(run, "valid_auc", ("valid", "final"))
                style: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": 0.85}
                axes[row, 0].plot(loss[0], _smooth(loss[1]), label=label, **style)
                axes[row, 1].plot(*auc, marker="o", markersize=2.5, label=label, **style)
                drawn += len(loss[0]) + len(auc[0])
        for axis, title in zip(axes[row], ("training loss", "validation AUC"), strict=True):
            axis.set_title(f"{_text(backbone)}: {title}", fontsize=9, loc="left", color="#222")
            axis.set_xlabel("step", fontsize=8)
        axes[row, 1].legend(fontsize=7, frameon=False, loc="lower right")
    return _png(figure) if drawn else None


def differences(table: list[dict[str, Any]], base: str) -> bytes | None:
    """AUC differences to the base with intervals, one panel per arm; None when none is defined.

    `table` is the table of a comparison, each row with a `label` for its section.
    """
    rows = [r for r in table if r["metric"] == "auc" and r["low"] is not None]
    groups = list(dict.fromkeys(r["group"] for r in rows))
    if not rows:
        return None
    labels = {(r["section"], r["key"]): _text(r["label"]) for r in rows}
    keys = list(labels)
    figure, axes = _figure(9.4, 0.9 + 0.27 * len(keys), 1, len(groups))
    for axis, group in zip(axes[0], groups, strict=True):
        axis.axvline(0, color="#555b66", linewidth=1)
        for row in (r for r in rows if r["group"] == group):
            height = -keys.index((row["section"], row["key"]))
            colour = {"better": "#2f8550", "worse": "#b83a3a"}.get(row["verdict"], "#8b919c")
            axis.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=2)
            axis.plot(row["difference"], height, "o", color=colour, markersize=5)
        axis.set_yticks([-n for n in range(len(keys))], [""] * len(keys))
        axis.set_title(_text(group), fontsize=9, loc="left", color="#222")
        axis.set_xlabel(f"AUC minus {_text(base, 24)}", fontsize=8)
        axis.set_ylim(-len(keys) + 0.4, 0.6)
        axis.locator_params(axis="x", nbins=5)
    axes[0, 0].set_yticks([-n for n in range(len(keys))], list(labels.values()))
    for axis in axes[0, 1:]:
        axis.sharex(axes[0, 0])
    return _png(figure)


def knowledge_map(
    users: np.ndarray, colour_of: list[str], scenarios: np.ndarray, names: list[str]
) -> bytes:
    """Scatter of projected user vectors, coloured, with named scenario vectors.

    Args:
        users: float [users, 2].
        colour_of: Group of each user [users]; "" is drawn grey.
        scenarios: float [scenarios, 2], may be empty.
        names: Name of each scenario [scenarios].
    """
    figure, axes = _figure(9.4, 4.9)
    axis = axes[0, 0]
    groups = [name for name in dict.fromkeys(sorted(colour_of)) if name]
    groups.sort(key=colour_of.count, reverse=True)
    shown, group_of = groups[: len(COLOURS)], np.array(colour_of, dtype=object)
    rest = ~np.isin(group_of, shown)
    if rest.any():
        axis.scatter(*users[rest].T, s=9, color=_GREY, alpha=0.7, linewidths=0, label="other")
    for number, name in enumerate(shown):
        points = users[group_of == name]
        axis.scatter(
            *points.T, s=11, color=COLOURS[number], alpha=0.65, linewidths=0, label=_text(name)
        )
    for point, name in zip(scenarios, names, strict=True):
        axis.scatter(*point, s=150, marker="*", color="#15181e", edgecolors="white", zorder=4)
        axis.annotate(
            _text(name),
            point,
            xytext=(7, 6),
            textcoords="offset points",
            fontsize=8.5,
            fontweight="bold",
            zorder=5,
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    axis.set_xlabel("first principal component", fontsize=8)
    axis.set_ylabel("second principal component", fontsize=8)
    legend = axis.legend(
        fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title="users by their\nmain scenario",
        title_fontsize=8,
        markerscale=1.8,
    )
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return _png(figure)
