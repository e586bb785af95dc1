"""From run directories to small CSV files; `page` makes the tables and figures of them."""

import csv
import json
import os
from collections.abc import Iterable, Set
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
from benchmarks.quality.page import figure, filled_pages
from launch.stages import is_evaluated
from trainer.evaluation.compare import compare
from trainer.models import BACKBONES

METRICS = ("auc", "gauc", "logloss")
CELL, PAIR = ("dataset", "backbone", "arm"), ("dataset", "backbone", "arm", "base")
Row = dict[str, str]  # a line of a CSV file
Cell = tuple[str, str, dict[str, list[Path]]]  # data set, backbone, runs of each arm


def write(work: Path, out: Path, pages: Path, jobs: int) -> None:
    """Writes the CSV files, versions.json, the figures and the page's tables.

    The CSV files are the record: what they have of cells that `work` lacks stays, so that a study can go
    on in another folder. Of a cell that was run again with other results every difference is new.

    Args:
        work: Of the study; everything finished in it is taken.
        out: Folder of the CSV files and figures.
        pages: Folder of the pages whose tables lie between markers.
        jobs: Processes that resample.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = read_csv(out / "runs.csv")
    cells = [
        (name, backbone, complete)
        for name in DATASETS
        for backbone in BACKBONES
        if (complete := not_fewer(name, backbone, _complete(work, name, backbone), record))
    ]
    if not cells:
        raise SystemExit(f"{work}: no finished runs; first: python -m benchmarks.quality run")
    trials = [row for name in DATASETS for arm in REGULARISED for row in _trials(work, name, arm)]
    all_trials = _save(out / "regularisation.csv", trials, ("dataset", "arm"))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        lines = _short_lines(_all_differences(work, cells, pool))
        runs = _run_rows(work, cells)
        changed = changed_cells(runs, record)
        all_runs = _save(out / "runs.csv", runs, CELL)
        all_differences = _save(out / "differences.csv", lines, PAIR, changed)
        tuned, tuned_runs = _regularised(work, cells, all_differences, all_trials, pool)
    changed_tuned = changed | changed_cells(tuned_runs, read_csv(out / "regularised_runs.csv"))
    _save(out / "regularised_runs.csv", tuned_runs, CELL)
    all_tuned = _save(out / "regularised_differences.csv", _short_lines(tuned), PAIR, changed_tuned)
    newest = max(
        work.glob("*/runs/*/*/trial-*/versions.json"), key=lambda file: file.stat().st_mtime
    )
    (out / "versions.json").write_text(newest.read_text())
    all_curves = _save(out / "sensitivity.csv", _curves(work), ("dataset", "backbone"))
    for name in DATASETS:
        curve = [row for row in all_curves if row["dataset"] == name]
        if curve:
            sensitivity.figure(curve, out / f"{name}_sensitivity.png")
        figure([row for row in all_differences if row["dataset"] == name], out / f"{name}.png")
    records = (all_runs, all_differences, all_curves, all_trials, all_tuned)
    for page, text in filled_pages(*records, pages).items():
        page.write_text(text, encoding="utf-8")


def _run_rows(work: Path, cells: list[Cell]) -> list[dict[str, Any]]:
    """The lines of runs.csv of these cells; last of each data set the truth, where it is known."""
    rows = [
        row
        for name, backbone, complete in cells
        for arm, runs in complete.items()
        for run in runs
        for row in _rows(name, backbone, arm, run)
    ]
    for name in dict.fromkeys(name for name, *_ in cells):
        head = dict.fromkeys(rows[0], "") | {"dataset": name, "arm": "truth", "seed": 0}
        rows += [head | _metrics(*block) for block in _sections(study.truth(work, name))]
    return rows


def _all_differences(
    work: Path, cells: list[Cell], pool: ProcessPoolExecutor
) -> list[dict[str, Any]]:
    """The differences of all cells, a backbone in each process of the pool."""
    files = [work / name / "runs" / backbone / "differences.json" for name, backbone, _ in cells]
    pairs = [_pairs(complete) for *_, complete in cells]
    compared = pool.map(_differences, [complete for *_, complete in cells], pairs, files)
    return [
        {"dataset": name, "backbone": backbone} | line
        for (name, backbone, _), lines in zip(cells, compared, strict=True)
        for line in lines
    ]


def _curves(work: Path) -> list[dict[str, Any]]:
    """The lines of sensitivity.csv."""
    return [
        row | {key: _short(row[key]) for key in ("auc", "new_user_auc")}
        for name in DATASETS
        for backbone in BACKBONES
        for row in sensitivity.rows(work, name, backbone)
    ]


def _complete(work: Path, name: str, backbone: str) -> dict[str, list[Path]]:
    """Arm to the runs that have been evaluated, by seed, with the settings that its trials chose.

    An arm that has a trial to come is left out.
    """
    complete: dict[str, list[Path]] = {}
    for arm in ARMS:
        if study.has_tried(work, name, backbone, arm):
            trained = study.seeds(work, name, backbone, arm, SEEDS)
            runs = [run for run, words in trained if study.is_current(run, words)]
            complete[arm] = [run for run in runs if is_evaluated(run)]
    return {arm: runs for arm, runs in complete.items() if runs}


def not_fewer(
    name: str, backbone: str, complete: dict[str, list[Path]], record: list[Row]
) -> dict[str, list[Path]]:
    """The arms that have no fewer seeds than the record: one that is on its way does not replace it."""
    seeds: dict[str, set[str]] = {}
    for row in record:
        if (row["dataset"], row["backbone"]) == (name, backbone):
            seeds.setdefault(row["arm"], set()).add(row["seed"])
    return {arm: runs for arm, runs in complete.items() if len(runs) >= len(seeds.get(arm, ()))}


def _rows(name: str, backbone: str, arm: str, run: Path) -> list[dict[str, Any]]:
    """One line per section of one run."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    head = {
        "dataset": name,
        "backbone": backbone,
        "arm": arm,
        "seed": study.seed_of(run),
        "learning_rate": config["train"]["learning_rate"],
        "meta_learning_rate": config["train"]["meta_learning_rate"],
        "table_learning_rate": config["tables"]["learning_rate"],
        "dropout": config["model"]["dropout"],
    }
    return [head | _metrics(*block) for block in _sections(evaluation)]


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


def _pairs(complete: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Of the study's differences those whose arms have the same seeds: others are not paired."""
    seeds = {arm: [study.seed_of(run) for run in runs] for arm, runs in complete.items()}
    pairs = {
        base: [arm for arm in arms if seeds.get(arm) == seeds[base]]
        for base, arms in DIFFERENCES.items()
        if base in seeds
    }
    return {base: arms for base, arms in pairs.items() if arms}


def _differences(
    complete: dict[str, list[Path]], pairs: dict[str, list[str]], file: Path
) -> list[dict[str, Any]]:
    """Paired bootstrap over users and seeds of a backbone's arms; kept in `file` while it holds."""
    newest = max(
        (run / "evaluation.json").stat().st_mtime for runs in complete.values() for run in runs
    )
    content = {
        arm: [os.path.relpath(run, file.parent) for run in runs] for arm, runs in complete.items()
    }
    key = json.dumps([content, pairs, RESAMPLES])
    if file.exists() and file.stat().st_mtime > newest:
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            return kept["lines"]
    lines = []
    for base, others in pairs.items():
        groups = [(arm, complete[arm]) for arm in (base, *others)]
        for row in compare(groups, RESAMPLES)["table"]:
            if row["difference"] is not None:
                row = (
                    row | {"base": base, "arm": row["group"]}
                    if base == "alone"
                    else _turned(row, base)
                )
                lines.append(
                    {"base": row["base"], "arm": row["arm"], "seeds": len(complete[base])}
                    | {key: row[key] for key in ("section", "key", "metric", "rows", "users")}
                    | {
                        key: _short(row[key])
                        for key in ("base_value", "value", "difference", "low", "high")
                    }
                    | {"verdict": row["verdict"]}
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "lines": lines}))
    return lines


def _turned(row: dict[str, Any], arm: str) -> dict[str, Any]:
    """A line of `compare` seen from the other side: how `arm`, its base, differs from its group."""
    words = {"better": "worse", "worse": "better"}
    return row | {
        "base": row["group"],
        "arm": arm,
        "base_value": row["value"],
        "value": row["base_value"],
        "difference": 0.0 - row["difference"],
        "low": 0.0 - row["high"],
        "high": 0.0 - row["low"],
        "verdict": words.get(row["verdict"], row["verdict"]),
    }


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _short_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of differences as the CSV file has them."""
    return [
        {key: row[key] for key in row if key != "verdict"}
        for row in rows
        if row["metric"] != "logloss"
    ]


def changed_cells(runs: list[dict[str, Any]], before: list[Row]) -> set[tuple[str, ...]]:
    """(dataset, backbone, arm) of runs that the record has with other results."""

    def results(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
        by_cell: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for row in rows:
            by_cell.setdefault(_key(row, CELL), set()).add(tuple(map(str, row.values())))
        return by_cell

    old = results(before)
    return {cell for cell, new in results(runs).items() if cell in old and old[cell] != new}


def _key(row: dict[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in columns)


def read_csv(file: Path) -> list[Row]:
    """The lines of a CSV file; none where it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def _save(
    file: Path,
    rows: list[dict[str, Any]],
    columns: tuple[str, ...],
    changed: Set[tuple[str, ...]] = frozenset(),
) -> list[Row]:
    """Puts rows in the place of those of a CSV file that have the same `columns`; the others stay.

    Not those of differences one of whose arms has `changed`. The file appears whole, by rename.

    Returns:
        All rows of the file, in the order of data sets, backbones and arms.
    """
    new = {_key(row, columns) for row in rows}
    kept = [
        row
        for row in read_csv(file)
        if _key(row, columns) not in new
        and changed.isdisjoint(
            (row["dataset"], row.get("backbone", ""), row.get(arm, "")) for arm in ("arm", "base")
        )
    ]
    order = {name: number for number, name in enumerate([*DATASETS, *BACKBONES, *ARMS, "truth"])}
    merged = [*kept, *rows]
    merged.sort(key=lambda row: [order.get(name, len(order)) for name in _key(row, columns)])
    if not merged:
        return []
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(merged[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    partial.replace(file)
    return read_csv(file)


def _trials(work: Path, name: str, arm: str) -> list[dict[str, Any]]:
    """One line per setting and backbone that an arm tried; empty until all have been trained."""
    evaluations = regularisation.evaluations(work, name, arm)
    if not evaluations:
        return []
    auc, known, new = (
        regularisation.auc(evaluations, segment) for segment in (None, "known", "new_user")
    )
    setting_of_all, setting_of_known = regularisation.choose(auc), regularisation.choose(known)
    return [
        {"dataset": name, "arm": arm, "setting": setting, "backbone": backbone}
        | {"chosen": int(setting == setting_of_all)}
        | {"chosen_by_known_users": int(setting == setting_of_known)}
        | {"valid_auc": _short(auc[setting][number])}
        | {
            "known_auc": _short(known[setting][number]),
            "new_user_auc": _short(new[setting][number]),
        }
        for setting in auc
        for number, backbone in enumerate(TUNED_ON)
    ]


def _regularised(
    work: Path,
    cells: list[Cell],
    differences: list[Row],
    trials: list[Row],
    pool: ProcessPoolExecutor,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Differences of the arms as tuned, and the runs that tuning added.

    Where both arms of a difference kept the study's setting it is the study's own. `differences` and
    `trials` are those on record, whatever folder they are from.
    """
    runs: list[dict[str, Any]] = []
    waiting = []
    settings: dict[str, dict[str, str]] = {name: {} for name in DATASETS}
    for row in trials:
        if row["chosen"] == "1":
            settings[row["dataset"]][row["arm"]] = row["setting"]
    lines: list[dict[str, Any]] = [
        {**row}
        for row in differences
        if row["seeds"] == str(SEEDS)
        and all(
            settings[row["dataset"]].get(row[arm]) == regularisation.UNCHANGED
            for arm in ("arm", "base")
        )
    ]
    for name, backbone, before in cells:
        complete = regularisation.complete(work, name, backbone, settings[name], before)
        changed = {arm for arm in complete if complete[arm] != before.get(arm)}
        pairs = _pairs(complete)
        again = {
            base: chosen
            for base, others in pairs.items()
            if (chosen := [arm for arm in others if base in changed or arm in changed])
        }
        if again:
            file = work / name / "regularisation" / backbone / "differences.json"
            waiting.append((name, backbone, pool.submit(_differences, complete, again, file)))
        for arm in changed:
            runs += [row for run in complete[arm] for row in _rows(name, backbone, arm, run)]
    for name, backbone, result in waiting:
        lines += [{"dataset": name, "backbone": backbone} | line for line in result.result()]
    order = {name: number for number, name in enumerate([*DATASETS, *BACKBONES, *ARMS])}
    keys = ("dataset", "backbone", "arm", "base")
    lines.sort(key=lambda row: [order[row[key]] for key in keys])
    return lines, runs
