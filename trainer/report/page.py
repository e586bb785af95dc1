"""One self-contained HTML page about runs: numbers, differences, curves, knowledge, stories.

The page needs no network and runs no script. Item titles and prompts come from users and are treated
as hostile: Jinja2 escapes everything, and the embedded JSON cannot close its own element.
"""

from __future__ import annotations

import base64
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_knowledge.dataset_files import read_description
from llm_knowledge.errors import InputError
from llm_knowledge.files import write_text
from llm_knowledge.levels import LEVELS
from llm_knowledge.store.manifest import read_manifest
from trainer.evaluation.metrics import (
    DEFINITIONS,
    evaluation_file,
    is_evaluation,
    write_evaluation,
)
from trainer.evaluation.predictions import RunDirectory, group_by_arm, read_run
from trainer.report.knowledge import (
    MIN_IMPRESSIONS,
    configured_stores,
    draw_map,
    store_directories,
    tell_stories,
)

if TYPE_CHECKING:
    from jinja2 import Template

COLUMNS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss": "logloss",
    "ne": "NE",
    "recall_at_10": "Recall@10",
    "ndcg_at_10": "NDCG@10",
    "knowledge_coverage": "coverage",
}
SEGMENT_WORDS = {
    "known": "known users",
    "sparse": "users with few positives",
    "new_in_scenario": "users new in scenario",
    "new_user": "new users",
}
_LOWER_IS_BETTER = {"logloss", "ne"}


@dataclass(frozen=True)
class Arm:
    """Runs of one arm (seeds) with their evaluations, in the order of the seeds."""

    name: str
    runs: list[RunDirectory]
    evaluations: list[dict[str, Any]]

    @property
    def backbone(self) -> str:
        """Name of the backbone, from the first run's configuration."""
        return str((self.runs[0].config.get("model") or {}).get("backbone", "backbone"))

    @property
    def uses_knowledge(self) -> bool:
        """Whether any knowledge store is configured."""
        return any(configured_stores(self.runs[0], level) for level in LEVELS)

    @property
    def is_control(self) -> bool:
        """Whether a store of the first run is a control by its own manifest, see `Manifest.control`."""
        stores = [
            store for level in LEVELS for store in store_directories(self.runs[0], level) or []
        ]
        return any(read_manifest(store).control is not None for store in stores)

    def spread(self, section: str, key: str | None, metric: str) -> dict[str, float] | None:
        """Mean and sd of a metric over seeds (one seed: no sd); None where it is undefined."""
        values = []
        for evaluation in self.evaluations:
            block = evaluation[section] if key is None else evaluation[section].get(key)
            if not block or block.get(metric) is None:
                return None
            values.append(block[metric])
        spread = {"mean": float(np.mean(values))}
        if len(values) > 1 and metric != "knowledge_coverage":
            spread["sd"] = float(np.std(values, ddof=1))
        return spread


def load_arms(paths: Sequence[Path]) -> list[Arm]:
    """Reads runs and their evaluations, grouped by arm; all must be about one dataset."""
    arms = []
    first: tuple[Path, Any] | None = None
    for name, members in group_by_arm(paths):
        runs = sorted(map(read_run, dict.fromkeys(members)), key=lambda r: (r.seed, str(r.path)))
        evaluations = [_evaluation(run) for run in runs]
        for run, evaluation in zip(runs, evaluations, strict=True):
            fingerprint = (evaluation.get("dataset") or {}).get("fingerprint")
            first = first or (run.path, fingerprint)
            if fingerprint != first[1]:
                raise InputError(
                    f"{run.path}: evaluated on another dataset than {first[0]}. One report is about "
                    "one dataset; write two reports."
                )
        arms.append(Arm(name, runs, evaluations))
    if not arms:
        raise InputError("a report needs at least one run directory.")
    return arms


def _evaluation(run: RunDirectory) -> dict[str, Any]:
    """Reads evaluation.json; computes it when it is absent, broken or older than the predictions."""
    file = evaluation_file(run.path)
    newest = max(part.stat().st_mtime for part in run.predictions("test"))
    if file.is_file() and file.stat().st_mtime >= newest:
        try:
            evaluation = json.loads(file.read_text(encoding="utf-8"))
            if is_evaluation(evaluation):
                return dict(evaluation)
        except (ValueError, RecursionError):
            pass
    return write_evaluation(run.path)


def knowledge_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs each plain backbone with the first arm that puts knowledge on it, controls left out."""
    pairs = []
    for base in arms:
        if base.uses_knowledge:
            continue
        for arm in arms:
            if arm.uses_knowledge and not arm.is_control and arm.backbone == base.backbone:
                pairs.append((base, arm))
                break
    return pairs


def _tables(arms: Sequence[Arm], names: dict[str, str]) -> dict[str, Any]:
    """The result tables: rows of cells {mean, sd, best} or None, ready for the template."""
    columns = [
        m for m in COLUMNS if any(arm.spread("overall", None, m) is not None for arm in arms)
    ]
    overall = {m: [arm.spread("overall", None, m) for arm in arms] for m in columns}
    for metric, cells in overall.items():
        _mark_best(cells, metric)
    first = arms[0].evaluations[0]
    parts = []
    for section, title in (("scenarios", "scenario"), ("segments", "segment")):
        rows = []
        for key, block in first[section].items():
            cells = [arm.spread(section, key, "auc") for arm in arms]
            _mark_best(cells, "auc")
            label = section_label(title, key, names)
            rows.append({"label": label, "key": key, "block": block, "cells": cells})
        bayes = any(row["block"].get("bayes_auc") is not None for row in rows)
        parts.append({"title": title, "rows": rows, "bayes": bayes})
    return {"columns": columns, "overall": overall, "parts": parts, "first": first["overall"]}


def _mark_best(cells: list[dict[str, Any] | None], metric: str) -> None:
    known = [cell for cell in cells if cell is not None]
    if metric == "knowledge_coverage" or len({round(cell["mean"], 4) for cell in known}) < 2:
        return
    pick = min if metric in _LOWER_IS_BETTER else max
    pick(known, key=lambda cell: cell["mean"])["best"] = True


def _sentence(row: dict[str, Any], base: str) -> str:
    """One difference in plain words."""
    if row["value"] is None or row["low"] is None:
        return f"{row['group']} against {base}: {row['metric']} is not defined (one class only)."
    verdict = {
        "better": "better than",
        "worse": "worse than",
        "no significant difference": "not significantly different from",
    }[row["verdict"]]
    return (
        f"{row['group']} is {verdict} {base}: AUC {row['value']:.4f} against "
        f"{row['base_value']:.4f}, difference {row['difference']:+.4f}, 95 % interval "
        f"[{row['low']:+.4f}, {row['high']:+.4f}]."
    )


def section_label(kind: str, key: str, names: dict[str, str]) -> str:
    """How a part of the table is called in the page: a scenario by its name, a segment in words."""
    if kind == "overall":
        return "all rows"
    return names.get(key) or key if kind == "scenario" else SEGMENT_WORDS.get(key, key)


def _comparisons(given: Any, names: dict[str, str]) -> list[dict[str, Any]]:
    from trainer.report.figures import differences

    results = [given] if isinstance(given, dict) else list(given or [])
    views = []
    for result in results:
        table = [
            row | {"label": section_label(row["section"], row["key"], names)}
            for row in result["table"]
        ]
        heads = [r for r in table if r["section"] == "overall"]
        views.append(
            {
                "result": result,
                "sentences": [
                    {"text": _sentence(r, result["base"]), "verdict": r["verdict"]}
                    for r in heads
                    if r["metric"] == "auc"
                ],
                "overall": heads,
                "auc": [r for r in table if r["section"] != "overall" and r["metric"] == "auc"],
                "picture": _data_url(differences(table, result["base"])),
            }
        )
    return views


def _breaks(name: str) -> Any:
    """Lets a browser break a long arm name after `+` and `_`; the name itself is escaped."""
    from markupsafe import Markup, escape

    mark = Markup("<wbr>")
    return escape(name).replace("+", "+" + mark).replace("_", "_" + mark)


def _data_url(png: bytes | None) -> str | None:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else None


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dict to (dotted key, text) pairs for a table of facts."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}{k}.")]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(prefix.rstrip("."), str(value))]


def _versions(arms: Sequence[Arm], facts: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    file = arms[0].runs[0].path / "versions.json"
    try:
        versions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        versions = {}
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {
        "training": _flat(versions) if versions else [("versions.json", "not written by the run")],
        "dataset": _flat(facts.get("versions") or {}),
        "report": [("machine", machine)],
    }


def _knowledge(pairs: list[tuple[Arm, Arm]], facts: dict[str, Any]) -> dict[str, Any]:
    """Map and stories; `why` says what is left out and for what reason."""
    if not pairs:
        return {"why": "No arm with knowledge stands beside its plain backbone in this report."}
    base, arm = pairs[0]
    view: dict[str, Any] = {"base": base.name, "arm": arm.name, "least": MIN_IMPRESSIONS}
    drawn = draw_map(arm.runs[0], facts)
    if drawn is None:
        stores = (arm.runs[0].config.get("knowledge") or {}).get("user")
        view["why"] = f"The user knowledge store ({stores}) is not there any more: no map."
    else:
        view |= {"picture": _data_url(drawn[0]), "caption": drawn[1]}
    view["stories"] = tell_stories(base.runs, arm.runs)
    return view


def _dataset_facts(arms: Sequence[Arm]) -> dict[str, Any]:
    dataset = next((run.dataset for arm in arms for run in arm.runs if run.dataset), None)
    if dataset is None:
        raise InputError(
            f"{arms[0].runs[0].path}/config.yaml: data.path holds no dataset.json; the report names "
            "scenarios and items from there. Put the dataset back or correct the path."
        )
    return read_description(dataset)


# Control characters but tab and line feed, and what turns the direction of a line around: with them a
# title could hide or rearrange what the page says.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(value: Any) -> Any:
    """Text without characters that steer a screen: each is shown as the replacement character."""
    from markupsafe import Markup

    if not isinstance(value, str):
        return value
    shown = _STEERING.sub("\ufffd", value)
    return Markup(shown) if isinstance(value, Markup) else shown


def embed_json(value: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>`, `&`, and ASCII alone."""
    text = json.dumps(
        value, allow_nan=False
    )  # ASCII, so that no character steers a reader's screen
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
    )
    environment.filters["breaks"] = _breaks
    return environment.get_template("report.html.j2")


def write_report(
    runs: list[Path],
    out: Path,
    comparison: dict[str, Any] | list[dict[str, Any]] | None = None,
) -> Path:
    """Writes a self-contained HTML report.

    Args:
        runs: Run directories, or directories of runs; runs with the same `name` are seeds of one arm.
            A missing or outdated evaluation.json is computed first.
        out: File to write, or a directory, which gets `report.html`.
        comparison: Result of `evaluation.compare.compare`, several of them (one per backbone), or None.

    Returns:
        Path of the file, written under a temporary name and renamed.

    Raises:
        InputError: No run, runs on different datasets, broken predictions or stores, no permission.
    """
    from markupsafe import Markup

    from trainer.report.figures import curves

    arms = load_arms(runs)
    facts = _dataset_facts(arms)
    names = {str(entry["scenario_id"]): entry.get("name") or "" for entry in facts["scenarios"]}
    views = _comparisons(comparison, names)
    knowledge = _knowledge(knowledge_pairs(arms), facts)
    for story in knowledge.get("stories", []):
        for row in story["rows"]:
            row["scenario"] = names.get(row["scenario"]) or row["scenario"]
    numbers = {
        "arms": [
            {"name": a.name, "runs": [str(r.path) for r in a.runs], "evaluations": a.evaluations}
            for a in arms
        ],
        "comparisons": [view["result"] for view in views],
        "stories": knowledge.get("stories", []),
    }
    html = _template().render(
        facts=facts,
        arms=arms,
        tables=_tables(arms, names),
        titles=COLUMNS,
        comparisons=views,
        curves=_data_url(curves([(a.name, a.backbone, [r.path for r in a.runs]) for a in arms])),
        knowledge=knowledge,
        versions=_versions(arms, facts),
        definitions=DEFINITIONS,
        numbers=Markup(embed_json(numbers)),
    )
    out = Path(out)
    return write_text(out / "report.html" if out.suffix != ".html" else out, html)
