"""From run directories to small CSV files, the page's tables and a figure per data set."""

import csv
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality import regularisation, sensitivity, study
from benchmarks.quality.arms import (
    ARMS,
    DATASETS,
    DIFFERENCES,
    REGULARISED,
    RESAMPLES,
    SEEDS,
    TUNED_ON,
)
from trainer.compare import compare
from trainer.models import BACKBONES

METRICS = ("auc", "gauc", "logloss")
ALL, NEW_USER = ("overall", "overall"), ("segment", "new_user")  # (section, key)
COLUMNS = [  # of the tables of differences
    (ALL, "auc", "all test events"),
    (NEW_USER, "auc", "users never seen"),
    (("segment", "new_in_scenario"), "auc", "users new in the scenario"),
    (("segment", "sparse"), "auc", "users with few positives"),
    (ALL, "gauc", "GAUC, all"),
    (NEW_USER, "gauc", "GAUC, never seen"),
]


def write(work: Path, out: Path, page: Path, jobs: int) -> None:
    """Writes the CSV files, versions.json, the figures and the page's tables.

    Args:
        work: Of the study; everything finished in it is taken.
        out: Folder of the CSV files and figures.
        page: docs/quality.md, whose tables lie between markers.
        jobs: Processes that resample.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    cells = [
        (name, backbone, found)
        for name in DATASETS
        for backbone in BACKBONES
        if (found := _complete(work, name, backbone))
    ]
    if not cells:
        raise SystemExit(f"{work}: no finished runs; first: python -m benchmarks.quality run")
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        files = [
            work / name / "runs" / backbone / "differences.json" for name, backbone, _ in cells
        ]
        pairs = [_pairs(found) for *_, found in cells]
        compared = pool.map(_differences, [found for *_, found in cells], pairs, files)
        for (name, backbone, found), lines in zip(cells, compared, strict=True):
            for arm, folders in found.items():
                runs += [row for run in folders for row in _rows(name, backbone, arm, run)]
            differences += [{"dataset": name, "backbone": backbone} | line for line in lines]
        tuned, tuned_runs = _regularised(work, cells, differences, pool)
    for name in dict.fromkeys(name for name, *_ in cells):
        head = dict.fromkeys(runs[0], "") | {"dataset": name, "arm": "truth", "seed": 0}
        runs += [head | _metrics(*block) for block in _sections(study.truth(work, name))]
    _save(out / "runs.csv", runs)
    _save(out / "regularised_runs.csv", tuned_runs)
    for file, rows in ("differences.csv", differences), ("regularised_differences.csv", tuned):
        short = [{key: row[key] for key in row if key != "verdict"} for row in rows]
        _save(out / file, [row for row in short if row["metric"] != "logloss"])
    newest = max(
        work.glob("*/runs/*/*/seed-*/versions.json"), key=lambda file: file.stat().st_mtime
    )
    (out / "versions.json").write_text(newest.read_text())
    curves = [
        row
        for name in DATASETS
        for backbone in BACKBONES
        for row in sensitivity.rows(work, name, backbone)
    ]
    if curves:
        rows = [row | {key: _short(row[key]) for key in ("auc", "new_user_auc")} for row in curves]
        _save(out / "sensitivity.csv", rows)
    trials = [row for name in DATASETS for arm in REGULARISED for row in _trials(work, name, arm)]
    _save(out / "regularisation.csv", trials)
    for name in DATASETS:
        own = [row for row in curves if row["dataset"] == name]
        if own:
            sensitivity.figure(own, out / f"{name}_sensitivity.png")
        _figure([row for row in differences if row["dataset"] == name], out / f"{name}.png")
    _page(runs, differences, curves, trials, tuned, page)


def _complete(work: Path, name: str, backbone: str) -> dict[str, list[Path]]:
    """Arm to the runs that have been evaluated, by seed, with the settings that its trials chose.

    An arm that has a trial to come is left out.
    """
    found: dict[str, list[Path]] = {}
    for arm in ARMS:
        if study.has_tried(work, name, backbone, arm):
            first = work / name / "runs" / backbone / arm / "seed-0"
            further = study.seeds(work, name, backbone, arm, SEEDS)
            runs = [first, *(run for run, words in further if study.is_current(run, words))]
            found[arm] = [run for run in runs if (run / "evaluation.json").exists()]
    return {arm: runs for arm, runs in found.items() if runs}


def _rows(name: str, backbone: str, arm: str, run: Path) -> list[dict[str, Any]]:
    """One line per section of one run."""
    found = json.loads((run / "evaluation.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    head = {
        "dataset": name, "backbone": backbone, "arm": arm, "seed": int(run.name.split("-")[1]),
        "learning_rate": config["train"]["learning_rate"],
        "meta_learning_rate": config["train"]["meta_learning_rate"],
        "table_learning_rate": config["tables"]["learning_rate"],
        "dropout": config["model"]["dropout"],
    }  # fmt: skip
    return [head | _metrics(*block) for block in _sections(found)]


def _sections(evaluation: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(section, key, metrics) of an evaluation; none of an empty one."""
    if not evaluation:
        return []
    sections = [("overall", "", evaluation["overall"])]
    sections += [("scenario", key, block) for key, block in evaluation["scenarios"].items()]
    return sections + [("segment", key, block) for key, block in evaluation["segments"].items()]


def _metrics(section: str, key: str, block: dict[str, Any]) -> dict[str, Any]:
    return {"section": section, "key": key, "rows": block["rows"], "users": block["users"]} | {
        metric: _short(block[metric]) for metric in METRICS
    }


def _pairs(found: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Of the wanted differences those whose arms have the same seeds: others are not paired."""
    seeds = {arm: [run.name for run in runs] for arm, runs in found.items()}
    return {
        one: others
        for one, wanted in DIFFERENCES.items()
        if (others := [arm for arm in wanted if one in found and seeds.get(arm) == seeds[one]])
    }


def _differences(
    found: dict[str, list[Path]], pairs: dict[str, list[str]], file: Path
) -> list[dict[str, Any]]:
    """Paired bootstrap over users and seeds of a backbone's arms; kept in `file` while it holds."""
    newest = max(
        (run / "evaluation.json").stat().st_mtime for runs in found.values() for run in runs
    )
    content = {
        arm: [os.path.relpath(run, file.parent) for run in runs] for arm, runs in found.items()
    }
    key = json.dumps([content, pairs, RESAMPLES])
    if file.exists() and file.stat().st_mtime > newest:
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            return kept["lines"]
    lines = []
    for one, others in pairs.items():
        groups = [(arm, found[arm]) for arm in (one, *others)]
        for row in compare(groups, RESAMPLES)["table"]:
            if row["difference"] is not None:
                row = (
                    row | {"base": one, "arm": row["group"]}
                    if one == "alone"
                    else _turned(row, one)
                )
                lines.append(
                    {"base": row["base"], "arm": row["arm"], "seeds": len(found[one])}
                    | {key: row[key] for key in ("section", "key", "metric", "rows", "users")}
                    | {key: _short(row[key]) for key in ("base_value", "value", "difference", "low", "high")}
                    | {"verdict": row["verdict"]}
                )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "lines": lines}))
    return lines


def _turned(row: dict[str, Any], arm: str) -> dict[str, Any]:
    """A line of `compare` seen from the other side: how `arm`, its base, differs from its group."""
    words = {"better": "worse", "worse": "better"}
    return row | {
        "base": row["group"], "arm": arm, "base_value": row["value"], "value": row["base_value"],
        "difference": 0.0 - row["difference"], "low": 0.0 - row["high"], "high": 0.0 - row["low"],
        "verdict": words.get(row["verdict"], row["verdict"]),
    }  # fmt: skip


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _save(file: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def _figure(rows: list[dict[str, Any]], file: Path) -> None:
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


def _page(
    runs: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    trials: list[dict[str, Any]],
    tuned: list[dict[str, Any]],
    page: Path,
) -> None:
    """Writes the tables of docs/quality.md between its markers; the words around them stay."""
    text = _between(page.read_text(encoding="utf-8"), "arms", _arms())
    text = _between(text, "summary", _summary(differences))
    text = _between(text, "regularisation", _chosen(trials) or "Not run yet.")
    text = _between(text, "regularised summary", _summary(tuned) or "Not run yet.")
    for name in DATASETS:
        own = [row for row in runs if row["dataset"] == name]
        tables = [_means(own), _intervals([row for row in differences if row["dataset"] == name])]
        body = "\n\n".join(table for table in tables if table) or "Not run yet."
        text = _between(text, name, body)
        body = _intervals([row for row in tuned if row["dataset"] == name])
        text = _between(text, f"{name} regularised", body or "Not run yet.")
        curve = sensitivity.table([row for row in curves if row["dataset"] == name])
        text = _between(text, f"{name} sensitivity", curve or "Not run yet.")
    page.write_text(text, encoding="utf-8")


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


def _summary(differences: list[dict[str, Any]]) -> str:
    """Mean and range of every difference over the backbones, and how many intervals exclude 0."""
    rows = []
    for name, arm, base in dict.fromkeys((r["dataset"], r["arm"], r["base"]) for r in differences):
        own = [r for r in differences if (r["dataset"], r["arm"], r["base"]) == (name, arm, base)]
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


def _trials(work: Path, name: str, arm: str) -> list[dict[str, Any]]:
    """One line per setting and backbone that an arm tried; empty until all have been trained."""
    auc = regularisation.reached(work, name, arm)
    known, new = (
        regularisation.reached(work, name, arm, segment) for segment in ("known", "new_user")
    )
    return [
        {"dataset": name, "arm": arm, "setting": setting, "backbone": backbone}
        | {"chosen": int(setting == regularisation.choose(auc))}
        | {"chosen_by_known_users": int(setting == regularisation.choose(known))}
        | {"valid_auc": _short(auc[setting][place])}
        | {"known_auc": _short(known[setting][place]), "new_user_auc": _short(new[setting][place])}
        for setting in auc
        for place, backbone in enumerate(TUNED_ON)
    ]


def _regularised(
    work: Path,
    cells: list[tuple[str, str, dict[str, list[Path]]]],
    differences: list[dict[str, Any]],
    pool: ProcessPoolExecutor,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Differences of the arms as tuned, and the runs that tuning added.

    Where both arms of a difference kept the study's setting it is the study's own.
    """
    lines: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    waiting = []
    settings = {name: regularisation.chosen(work, name) for name in DATASETS}
    for name, backbone, before in cells:
        found = regularisation.complete(work, name, backbone, settings[name], before)
        changed = {arm for arm in found if found[arm] != before.get(arm)}
        pairs = _pairs(found)
        lines += [
            row
            for row in differences
            if (row["dataset"], row["backbone"]) == (name, backbone)
            and {row["arm"], row["base"]} <= set(found) - changed
        ]
        again = {
            one: chosen
            for one, others in pairs.items()
            if (chosen := [arm for arm in others if one in changed or arm in changed])
        }
        if again:
            file = work / name / "regularisation" / backbone / "differences.json"
            waiting.append((name, backbone, pool.submit(_differences, found, again, file)))
        for arm in changed:
            runs += [row for run in found[arm] for row in _rows(name, backbone, arm, run)]
    for name, backbone, result in waiting:
        lines += [{"dataset": name, "backbone": backbone} | line for line in result.result()]
    order = {name: place for place, name in enumerate([*DATASETS, *BACKBONES, *ARMS])}
    keys = ("dataset", "backbone", "arm", "base")
    lines.sort(key=lambda row: [order[row[key]] for key in keys])
    return lines, runs


def _chosen(trials: list[dict[str, Any]]) -> str:
    """What tuning the regularisation chose for every arm, and what it would have by known users."""
    rows = []
    for name, arm in dict.fromkeys((row["dataset"], row["arm"]) for row in trials):
        own = [row for row in trials if (row["dataset"], row["arm"]) == (name, arm)]
        (setting,) = {row["setting"] for row in own if row["chosen"]}
        (by_known,) = {row["setting"] for row in own if row["chosen_by_known_users"]}
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


def _means(runs: list[dict[str, Any]]) -> str:
    """Mean test AUC of every arm over its seeds, per section."""
    sections = list(dict.fromkeys((row["section"], row["key"]) for row in runs if row["auc"]))
    if not sections:
        return ""
    rows = []
    for backbone, arm in dict.fromkeys((row["backbone"], row["arm"]) for row in runs):
        own = [row for row in runs if (row["backbone"], row["arm"]) == (backbone, arm)]
        cells = []
        for section in sections:
            found = [float(row["auc"]) for row in _of(section, own) if row["auc"]]
            cells.append(f"{sum(found) / len(found):.4f}" if found else "–")
        rows.append([backbone, arm, str(len({row["seed"] for row in own})), *cells])
    return _table(["backbone", "arm", "seeds", *(key or name for name, key in sections)], rows)


def _interval(value: float, low: float, high: float) -> str:
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{value:+.4f}{mark} [{low:+.4f}, {high:+.4f}]"


def _intervals(differences: list[dict[str, Any]]) -> str:
    """Differences with 95 % intervals: in AUC overall and where ids know little, and in GAUC."""
    rows = []
    for pair in dict.fromkeys((r["backbone"], r["arm"], r["base"]) for r in differences):
        backbone, arm, base = pair
        own = [r for r in differences if (r["backbone"], r["arm"], r["base"]) == pair]
        cells = []
        for section, metric, _ in COLUMNS:
            found = _of(section, own, metric)
            if not found:
                cells.append("–")
                continue
            value, low, high = (float(found[0][k]) for k in ("difference", "low", "high"))
            cells.append(_interval(value, low, high))
        rows.append([backbone, f"{arm} - {base}", str(own[0]["seeds"]), *cells])
    return _table(["backbone", "difference", "seeds", *(words for *_, words in COLUMNS)], rows)
