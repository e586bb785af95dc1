"""What the knowledge did: a map of the vectors and the stories of three users, chosen by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_knowledge.dataset_files import part_files
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from llm_knowledge.store.neighbours import nearest, unit_length
from trainer.evaluation.bootstrap import read_sorted
from trainer.evaluation.metrics import EPSILON
from trainer.evaluation.predictions import RunDirectory, database
from trainer.report.figures import knowledge_map

if TYPE_CHECKING:
    from llm_knowledge.store.reader import KnowledgeStore

MAP_USERS = 2000
MIN_IMPRESSIONS = 5
SHOWN_IMPRESSIONS = 10
NEIGHBOURS = 3
SCANNED_VECTORS = 200_000
RULES = ("largest improvement", "median", "largest loss")


def configured_stores(run: RunDirectory, level: str) -> list[str]:
    """Paths of the stores of one level, as the run's configuration names them."""
    paths = (run.config.get("knowledge") or {}).get(level) or []
    return [paths] if isinstance(paths, str) else list(paths)


def store_directories(run: RunDirectory, level: str) -> list[Path] | None:
    """The stores of one level that a run used, dated ones each by itself; None if one is gone."""
    from llm_knowledge.store.dated import store_paths

    paths = configured_stores(run, level)
    for folders in (list(map(Path, paths)), [run.path / path for path in paths]):
        inside = [[folder / "manifest.json", *folder.glob("*/manifest.json")] for folder in folders]
        if folders and all(any(file.is_file() for file in files) for files in inside):
            return [store for folder in folders for store in store_paths(folder)]
    return None


def open_store(run: RunDirectory, level: str) -> KnowledgeStore | None:
    """Opens the store of one level that a run used, the newest of dated ones; None if it is gone."""
    from llm_knowledge.store.dated import DatedStores

    directories = store_directories(run, level)
    return None if directories is None else DatedStores.open(directories).stores[-1]


def _sample_vectors(store: KnowledgeStore, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and unit vectors of at most `limit` rows, in 40 evenly spaced blocks."""
    rows = store.manifest.rows
    if rows <= limit:
        ranges = [(0, rows)]
    else:
        size = limit // 40
        starts = np.linspace(0, rows - size, 40).astype(int).tolist()
        ranges = [(start, start + size) for start in starts]
    vectors = np.concatenate([store.read_vectors(*part) for part in ranges])
    return np.concatenate([np.arange(*part) for part in ranges]), unit_length(vectors)


def draw_map(run: RunDirectory, facts: dict[str, Any]) -> tuple[bytes, str] | None:
    """Draws users and scenarios of a run's stores in the plane of the users' two main directions.

    Returns:
        PNG bytes and a caption; None when the run has no user store with two rows at hand.
    """
    users = open_store(run, "user")
    if users is None or run.dataset is None or users.manifest.rows < 2:
        return None
    rows, vectors = _sample_vectors(users, MAP_USERS)
    centre = vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(vectors - centre, full_matrices=False)
    plane = np.zeros((2, vectors.shape[1]), np.float32)
    plane[: len(directions)] = directions[:2]
    share = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    titles = {str(entry["scenario_id"]): entry.get("name") or "" for entry in facts["scenarios"]}
    main = _main_scenarios(run.dataset, users.keys()[rows])
    colours = [titles.get(key) or key for key in main]
    caption = (
        f"{len(rows):,} of {users.manifest.rows:,} users; the plane keeps {share:.0%} of the "
        "variance of their unit vectors. "
    )
    scenarios = open_store(run, "scenario")
    points, names = np.empty((0, 2)), []
    if scenarios is not None and scenarios.manifest.dim == users.manifest.dim:
        keys = list(map(str, scenarios.keys()))
        points = (unit_length(scenarios.read_vectors(0, len(keys))) - centre) @ plane.T
        names = [titles.get(key) or key for key in keys]
        caption += "Stars: scenario vectors, projected into the same plane."
    picture = knowledge_map((vectors - centre) @ plane.T, colours, points, names)
    return picture, caption


def _main_scenarios(dataset: Path, users: np.ndarray) -> list[str]:
    """The scenario with most profile events of each user; "" for users without any."""
    import pyarrow as pa

    files = part_files(dataset, "profile")
    if not files:
        return [""] * len(users)
    with database() as con:
        con.register("wanted", pa.table({"user_id": users.tolist()}))
        rows = con.execute(
            f"""SELECT user_id, arg_max(scenario, (n, scenario)) FROM (
                 SELECT user_id, scenario_id::VARCHAR AS scenario, count(*) AS n
                 FROM {parquet_sql(files)} SEMI JOIN wanted USING (user_id) GROUP BY ALL)
               GROUP BY user_id"""
        ).fetchall()
    main = dict(rows)
    return [main.get(user, "") for user in users.tolist()]


def tell_stories(
    base: Sequence[RunDirectory], treated: Sequence[RunDirectory]
) -> list[dict[str, Any]]:
    """Tells what knowledge changed for three test users: best, median and worst.

    Users are ordered by the fall of their mean logloss from the backbone to the arm with knowledge
    (predictions averaged over seeds), among users with knowledge and at least MIN_IMPRESSIONS test
    impressions (if nobody has so many: one).

    Returns:
        Dicts with rule, user, impressions, base_loss, loss, change (positive: better), prompt (or
        None), neighbours (user, cosine, line) and rows (title, scenario, label, base, value); empty
        when no test user has knowledge.

    Raises:
        InputError: The runs hold predictions for different rows.
    """
    columns, before, after = _paired_predictions(base, treated)
    users, start, counts = np.unique(columns["user_id"], return_index=True, return_counts=True)
    losses = [np.add.reduceat(_loss(columns["label"], p), start) / counts for p in (before, after)]
    change = losses[0] - losses[1]
    known = np.logical_and.reduceat(columns["has_knowledge"].astype(bool), start)
    eligible = np.flatnonzero(known & (counts >= MIN_IMPRESSIONS))
    if not len(eligible):
        eligible = np.flatnonzero(known)
    if not len(eligible):
        return []
    order = eligible[np.argsort(-change[eligible], kind="stable")]
    chosen = dict(zip(RULES, (order[0], order[len(order) // 2], order[-1]), strict=True))
    stories = []
    for rule, number in chosen.items():
        rows = slice(start[number], start[number] + counts[number])
        stories.append(
            {
                "rule": rule,
                "user": users[number],
                "candidates": len(eligible),
                "impressions": int(counts[number]),
                "base_loss": float(losses[0][number]),
                "loss": float(losses[1][number]),
                "change": float(change[number]),
                "rows": _impressions(columns, before, after, rows),
            }
        )
    _add_titles(treated[0], stories)
    _add_knowledge(treated[0], stories)
    return [_plain(story) for story in stories]


def _paired_predictions(
    base: Sequence[RunDirectory], treated: Sequence[RunDirectory]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    means = []
    columns: dict[str, np.ndarray] = {}
    for runs in (base, treated):
        total: Any = 0.0
        for run in runs:
            rows = read_sorted(run, None, "test")
            for name in ("user_id", "item_id", "scenario", "timestamp", "label"):
                if columns and not np.array_equal(rows[name], columns[name]):
                    raise InputError(
                        f"{run.path}: its test predictions are for other rows than those of "
                        f"{base[0].path}. Report runs on the same dataset only."
                    )
            columns = rows
            total = total + rows["prediction"].astype(np.float64)
        means.append(total / len(runs))
    return columns, means[0], means[1]


def _loss(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    clipped = np.clip(prediction, EPSILON, 1 - EPSILON)
    return -np.log(np.where(label == 1, clipped, 1 - clipped))


def _impressions(
    columns: dict[str, np.ndarray], before: np.ndarray, after: np.ndarray, rows: slice
) -> list[dict[str, Any]]:
    """The impressions whose prediction moved most, in time order."""
    index = np.arange(rows.start, rows.stop)
    moved = np.abs(after[index] - before[index])
    index = index[np.argsort(-moved, kind="stable")[:SHOWN_IMPRESSIONS]]
    index = index[np.argsort(columns["timestamp"][index], kind="stable")]
    return [
        {
            "item": columns["item_id"][i],
            "scenario": str(columns["scenario"][i]),
            "label": int(columns["label"][i]),
            "base": float(before[i]),
            "value": float(after[i]),
        }
        for i in index
    ]


def _add_titles(run: RunDirectory, stories: list[dict[str, Any]]) -> None:
    items = list({row["item"] for story in stories for row in story["rows"]})
    file = run.dataset / "items.parquet" if run.dataset else None
    titles: dict[Any, str] = {}
    if file is not None and file.is_file():
        import pyarrow.parquet as pq

        columns = ["item_id", "title"]
        table = pq.read_table(file, columns=columns, filters=[("item_id", "in", items)])
        titles = dict(zip(*(table[name].to_pylist() for name in columns), strict=True))
    for story in stories:
        for row in story["rows"]:
            row["title"] = titles.get(row["item"]) or f"item {row['item']}"


def _add_knowledge(run: RunDirectory, stories: list[dict[str, Any]]) -> None:
    """Adds each user's prompt and nearest users; streams the vectors once."""
    store = open_store(run, "user")
    for story in stories:
        story |= {"prompt": None, "neighbours": []}
    if store is None:
        return
    keys = store.keys()
    rows = store.row_of([story["user"] for story in stories])
    with_vector = [
        (story, row) for story, row in zip(stories, rows.tolist(), strict=True) if row >= 0
    ]
    neighbours = nearest(store, [row for _, row in with_vector], NEIGHBOURS, SCANNED_VECTORS)
    for (story, row), near in zip(with_vector, neighbours, strict=True):
        own_text, *texts = store.read_text([row, *(other for other, _ in near)])
        story["prompt"] = own_text["prompt"]
        story["neighbours"] = [
            {"user": keys[other], "cosine": cosine, "line": _first_lines(text["prompt"] or "")}
            for (other, cosine), text in zip(near, texts, strict=True)
        ]


def _first_lines(prompt: str, limit: int = 260) -> str:
    lines = [line.strip() for line in prompt.splitlines() if line.strip()][:3]
    text = " / ".join(lines)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _plain(value: Any) -> Any:
    """NumPy scalars to Python's, so that JSON and templates see plain values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
