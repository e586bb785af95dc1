"""AUC by the step size of the meta networks, for both forms of the generator.

The paper calls this step size sensitive. Everything but the form and the step size is fixed; layers are
of low rank, the kind that the paper has.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import FORMS, META_RATES, SENSITIVITY_SEEDS
from benchmarks.quality.study import assignments

_FIXED = {"train.learning_rate": 1e-3, "tables.learning_rate": 0.02, "model.dropout": 0.3}


def plan(work: Path, name: str, backbone: str) -> list[tuple[Path, list[str]]]:
    """Run directory and assignments of every run: the forms, and the backbone alone to compare with."""
    folder = work / name / "sensitivity" / backbone
    cells: list[tuple[str, str, dict[str, Any]]] = [("alone", "alone", {})]
    for form in FORMS:
        for rate in META_RATES:
            changes = {"model.meta.form": form, "train.meta_learning_rate": rate}
            cells.append((f"{form}-{rate:g}", "low_rank", changes))
    return [
        (run, assignments(work, name, backbone, arm, seed, run, {**_FIXED, **changes}))
        for cell, arm, changes in cells
        for seed in range(SENSITIVITY_SEEDS)
        for run in [folder / cell / f"seed-{seed}"]
    ]


def rows(work: Path, name: str, backbone: str) -> list[dict[str, Any]]:
    """One line per run that has been evaluated: form, step size, seed, test AUC overall and unseen."""
    found = []
    for run, _ in plan(work, name, backbone):
        file = run / "evaluation.json"
        if not file.exists():
            continue
        form, _, rate = run.parent.name.partition("-")
        evaluation = json.loads(file.read_text())
        blocks = {"auc": evaluation["overall"], "new_user_auc": evaluation["segments"]["new_user"]}
        head = {
            "dataset": name,
            "backbone": backbone,
            "form": form,
            "meta_learning_rate": float(rate) if rate else None,
            "seed": int(run.name.removeprefix("seed-")),
        }
        found.append(head | {key: block["auc"] for key, block in blocks.items()})
    return found


def _auc(lines: list[dict[str, str]], form: str, rate: float | None) -> list[float]:
    """Test AUC of every seed, from lines of the CSV file."""
    return [
        float(row["auc"])
        for row in lines
        if row["form"] == form
        and (float(row["meta_learning_rate"]) if row["meta_learning_rate"] else None) == rate
    ]


def table(lines: list[dict[str, str]]) -> str:
    """Mean and range over seeds of the test AUC, a line per step size, a column per form."""
    if not lines:
        return ""

    def cell(form: str, rate: float | None) -> str:
        own = _auc(lines, form, rate)
        return f"{sum(own) / len(own):.4f} ({min(own):.4f} to {max(own):.4f})" if own else "–"

    text = ["| step size of the meta networks | " + " | ".join(FORMS) + " |", "|---|---|---|"]
    text += [
        f"| {rate:g} | " + " | ".join(cell(form, rate) for form in FORMS) + " |"
        for rate in META_RATES
    ]
    return "\n".join(text) + f"\n\nThe backbone alone: {cell('alone', None)}."


def figure(lines: list[dict[str, str]], file: Path) -> None:
    """The curves, with every seed as a point and the backbone alone as a line."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 3.4), layout="constrained")
    axis = sheet.subplots()
    for form in FORMS:
        own = [r for r in lines if r["form"] == form]
        if not own:
            continue
        rates = sorted({float(row["meta_learning_rate"]) for row in own})
        values = [_auc(own, form, rate) for rate in rates]
        (line,) = axis.plot(rates, [sum(v) / len(v) for v in values], label=form)
        for rate, points in zip(rates, values, strict=True):
            axis.plot([rate] * len(points), points, "o", ms=3, color=line.get_color())
    alone = _auc(lines, "alone", None)
    if alone:
        axis.axhline(sum(alone) / len(alone), color="0.4", lw=0.8, label="backbone alone")
    axis.set_xscale("log")
    axis.set_xlabel("step size of the meta networks")
    axis.set_ylabel("test AUC")
    axis.legend(fontsize=8)
    sheet.savefig(file, dpi=110)
