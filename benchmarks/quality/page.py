"""The tables and figures of the study in docs/results, from the rows of the CSV files."""

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

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
    rows = []
    pairs = _query(
        """SELECT dataset, arm, base, count(DISTINCT backbone)::VARCHAR FROM lines
           GROUP BY ALL ORDER BY min(line)""",
        differences,
    )
    cells = [_cells(differences, section, metric) for section, metric, _ in COLUMNS]
    for name, arm, base, backbones in pairs:
        of_pair = [column.get((name, arm, base), "–") for column in cells]
        rows.append([name, f"{arm} - {base}", backbones, *of_pair])
    return _table(["data set", "difference", "backbones", *(words for *_, words in COLUMNS)], rows)


def _cells(
    differences: list[dict[str, Any]], section: tuple[str, str], metric: str
) -> dict[tuple[str, str, str], str]:
    """(data set, arm, base) to what a column of the summary says of it."""
    found = _query(
        """SELECT dataset, arm, base, sum(difference::DOUBLE) / count(*), min(difference::DOUBLE),
                  max(difference::DOUBLE), count(*), count(*) FILTER (low::DOUBLE > 0),
                  count(*) FILTER (high::DOUBLE < 0)
           FROM lines WHERE section = ? AND key = ? AND metric = ? GROUP BY ALL""",
        differences,
        *section,
        metric,
    )
    cells = {}
    for name, arm, base, mean, least, most, count, above, below in found:
        spread = f" ({least:+.3f} to {most:+.3f})" if count > 1 else ""
        cells[name, arm, base] = f"{mean:+.3f}{spread}; {above} above, {below} below"
    return cells


def coverage(runs: list[dict[str, Any]]) -> str:
    """On how many backbones every arm has all its seeds; which ones, where they are a few."""
    whole = set(
        _query(
            """SELECT arm, dataset, backbone FROM lines
               GROUP BY ALL HAVING count(DISTINCT seed) = ?""",
            runs,
            SEEDS,
        )
    )
    rows = []
    for arm in ARMS:
        cells = []
        for name in DATASETS:
            there = [backbone for backbone in BACKBONES if (arm, name, backbone) in whole]
            names = f": {', '.join(there)}" if 0 < len(there) <= len(BACKBONES) // 2 else ""
            cells.append(f"{len(there)}{names}")
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
    found = _query(
        """SELECT dataset, arm, any_value(setting) FILTER (chosen = '1') AS best,
                  any_value(setting) FILTER (chosen_by_known_users = '1') FROM lines
           GROUP BY ALL ORDER BY min(line)""",
        trials,
    )
    means_of = {
        (name, arm, setting): aucs
        for name, arm, setting, *aucs in _query(
            """SELECT dataset, arm, setting, sum(valid_auc::DOUBLE) / ?, fsum(new_user_auc::DOUBLE) / ?
               FROM lines GROUP BY dataset, arm, setting""",
            trials,
            len(TUNED_ON),
            len(TUNED_ON),
        )
    }
    rows = []
    for name, arm, setting, by_known in found:
        before, after = (means_of[name, arm, s] for s in (regularisation.UNCHANGED, setting))
        cells = [
            f"{b:.4f}" if a == b else f"{b:.4f} to {a:.4f}"
            for b, a in zip(before, after, strict=True)
        ]
        rows.append([name, arm, setting, *cells, by_known])
    head = ["data set", "arm", "chosen", "valid AUC", "of users held out of tuning"]
    return _table([*head, "chosen by known users alone"], rows)


def means(runs: list[dict[str, Any]]) -> str:
    """Mean test AUC over the seeds of the main arms, a line per backbone; the best possible, if known."""
    found = _query(
        """SELECT backbone, arm, sum(auc::DOUBLE) / count(*) FROM lines
           WHERE section = 'overall' AND auc <> '' GROUP BY ALL""",
        runs,
    )
    aucs = {(backbone, arm): f"{auc:.4f}" for backbone, arm, auc in found}
    backbones = _query(
        "SELECT backbone FROM lines WHERE arm <> 'truth' GROUP BY ALL ORDER BY min(line)", runs
    )
    rows = [
        [backbone, *(aucs.get((backbone, arm), "–") for arm in MEANS)] for (backbone,) in backbones
    ]
    best = aucs.get(("", "truth"))
    note = f"\n\nBest possible, by the truth of the log: {best}." if best else ""
    return _table(["backbone", *MEANS], rows) + note


def _query(sql: str, rows: list[dict[str, Any]], *values: Any) -> list[tuple[Any, ...]]:
    """What a query finds in rows of a CSV file: table `lines`, `line` is the number of a row."""
    if not rows:
        return []
    lines = pa.Table.from_pylist([{"line": line, **row} for line, row in enumerate(rows)])
    with duckdb.connect() as connection:
        connection.register("lines", lines)
        return connection.execute(sql, list(values)).fetchall()
