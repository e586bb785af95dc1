"""The tables and figures of the study in docs/results, from the rows of the CSV files."""

from pathlib import Path
from typing import Any

from benchmarks.quality import regularisation, sensitivity
from benchmarks.quality.arms import ARMS, DATASETS, SEEDS, TUNED_ON
from trainer.models import BACKBONES

ALL, NEW_USER = ("overall", "overall"), ("segment", "new_user")  # (section, key)
COLUMNS = [  # of the tables of differences, the rest is in the CSV files
    (ALL, "auc", "AUC, all test events"),
    (NEW_USER, "auc", "AUC, users never seen"),
    (ALL, "gauc", "GAUC, all"),
]
MEANS = ("alone", "shuffled", "random", "features", "llm4msr")  # columns of the table of means


def filled_pages(
    runs: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    trials: list[dict[str, Any]],
    tuned: list[dict[str, Any]],
    folder: Path,
) -> dict[Path, str]:
    """The pages of docs/results with the study's tables between their markers; words stay."""
    tables = {
        "arms": _arms(),
        "coverage": coverage(runs),
        "regularisation": _chosen(trials),
        "regularised summary": summary(tuned),
    }
    for name in DATASETS:
        of_dataset = [row for row in differences if row["dataset"] == name]
        tables[f"{name} means"] = means([row for row in runs if row["dataset"] == name])
        tables[f"{name} summary"] = summary(of_dataset)
        curve = [row for row in curves if row["dataset"] == name]
        tables[f"{name} sensitivity"] = sensitivity.table(curve)
    pages = {}
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = _between(text, name, table or "Not run yet.")
        pages[page] = text
    return pages


def _between(text: str, name: str, body: str) -> str:
    """The page's text with this body between the markers of that name, if it has them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        return text
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{body}\n\n{end}{rest.split(end, 1)[1]}"


def _arms() -> str:
    """What every arm is there to tell."""
    rows = [[name, arm.question] for name, arm in ARMS.items()]
    return _table(["arm", "what it is there to tell"], rows)


def summary(differences: list[dict[str, Any]]) -> str:
    """Mean and range of every difference over the backbones, and how many intervals exclude 0."""
    of_pair: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in differences:
        of_pair.setdefault((row["dataset"], row["arm"], row["base"]), []).append(row)
    rows = []
    for (name, arm, base), own in of_pair.items():
        cells = []
        for section, metric, _ in COLUMNS:
            found = _of(section, own, metric)
            if not found:
                cells.append("–")
                continue
            values = [float(row["difference"]) for row in found]
            above = sum(float(row["low"]) > 0 for row in found)
            below = sum(float(row["high"]) < 0 for row in found)
            spread = f" ({min(values):+.3f} to {max(values):+.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):+.3f}{spread}; {above} above, {below} below")
        rows.append([name, f"{arm} - {base}", str(len({row["backbone"] for row in own})), *cells])
    return _table(["data set", "difference", "backbones", *(words for *_, words in COLUMNS)], rows)


def coverage(runs: list[dict[str, Any]]) -> str:
    """On how many backbones every arm has all its seeds; which ones, where they are a few."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in runs:
        cell = found.setdefault((row["arm"], row["dataset"]), {})
        cell.setdefault(row["backbone"], set()).add(row["seed"])
    rows = []
    for arm in ARMS:
        cells = []
        for name in DATASETS:
            seeds = found.get((arm, name), {})
            whole = [backbone for backbone in BACKBONES if len(seeds.get(backbone, ())) == SEEDS]
            names = f": {', '.join(whole)}" if 0 < len(whole) <= len(BACKBONES) // 2 else ""
            cells.append(f"{len(whole)}{names}")
        rows.append([arm, *cells])
    return _table(["arm", *DATASETS], rows)


def figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Differences in AUC with their intervals, backbone by backbone: overall and for new users."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["metric"] == "auc" and row["arm"] == "llm4msr"]
    backbones = [name for name in BACKBONES if any(row["backbone"] == name for row in rows)]
    bases = [base for base in ("alone", "shuffled") if any(row["base"] == base for row in rows)]
    if not backbones or not bases:
        return
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(backbones)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (section, _, title) in zip(axes, COLUMNS[:2], strict=True):
        for number, base in enumerate(bases):
            chosen = {row["backbone"]: row for row in _of(section, rows) if row["base"] == base}
            places = [
                y + 0.24 * (number - 0.5) for y, name in enumerate(backbones) if name in chosen
            ]
            values = [chosen[name] for name in backbones if name in chosen]
            centre = [float(row["difference"]) for row in values]
            spread = [
                [c - float(row["low"]) for c, row in zip(centre, values, strict=True)],
                [float(row["high"]) - c for c, row in zip(centre, values, strict=True)],
            ]
            axis.errorbar(
                centre, places, xerr=spread, fmt="o", ms=4, capsize=2, label=f"LLM4MSR - {base}"
            )
        axis.axvline(0, color="0.4", lw=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("difference in AUC, 95 % interval")
    axes[0].set_yticks(range(len(backbones)), backbones)
    axes[0].invert_yaxis()
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(file, dpi=110)


def _of(
    section: tuple[str, str], rows: list[dict[str, Any]], metric: str | None = None
) -> list[dict[str, Any]]:
    """The rows of one (section, key), and of one metric where rows have one each."""
    return [
        row
        for row in rows
        if (row["section"], row["key"]) == section and metric in (None, row.get("metric"))
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; empty without rows."""
    first, *rest = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([first, "|" + "---|" * len(head), *rest]) if rows else ""


def _chosen(trials: list[dict[str, Any]]) -> str:
    """What tuning the regularisation chose for every arm, and what it would have by known users."""
    rows = []
    for name, arm in dict.fromkeys((row["dataset"], row["arm"]) for row in trials):
        own = [row for row in trials if (row["dataset"], row["arm"]) == (name, arm)]
        (setting,) = {row["setting"] for row in own if row["chosen"] == "1"}
        (by_known,) = {row["setting"] for row in own if row["chosen_by_known_users"] == "1"}
        cells = []
        for key in ("valid_auc", "new_user_auc"):
            before, after = (
                sum(float(row[key]) for row in own if row["setting"] == words) / len(TUNED_ON)
                for words in (regularisation.UNCHANGED, setting)
            )
            cells.append(f"{before:.4f}" if after == before else f"{before:.4f} to {after:.4f}")
        rows.append([name, arm, setting, *cells, by_known])
    head = ["data set", "arm", "chosen", "valid AUC", "of users held out of tuning"]
    return _table([*head, "chosen by known users alone"], rows)


def means(runs: list[dict[str, Any]]) -> str:
    """Mean test AUC over the seeds of the main arms, a line per backbone; the best possible, if known."""
    of_cell: dict[tuple[str, str], list[float]] = {}
    for row in runs:
        if row["section"] == "overall" and row["auc"]:
            of_cell.setdefault((row["backbone"], row["arm"]), []).append(float(row["auc"]))

    def auc(backbone: str, arm: str) -> str:
        values = of_cell.get((backbone, arm))
        return f"{sum(values) / len(values):.4f}" if values else "–"

    backbones = dict.fromkeys(row["backbone"] for row in runs if row["arm"] != "truth")
    rows = [[backbone, *(auc(backbone, arm) for arm in MEANS)] for backbone in backbones]
    best = auc("", "truth")
    note = "" if best == "–" else f"\n\nBest possible, by the truth of the log: {best}."
    return _table(["backbone", *MEANS], rows) + note
