"""Prepare Amazon Food-Kitchen: two natural scenarios, positives only, negatives sampled."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    DatasetInfo,
    Negatives,
    Scenario,
    SplitInfo,
    SplitName,
    event_schema,
    item_fields,
    read_footer,
)
from trainer.data.sources.movielens import usual_places
from trainer.data.sources.raw_columns import refuse_twins
from trainer.data.sources.staging import Staging, finish, hold_out, run_codes, split_per_user
from trainer.data.sources.writer import connect, output_directory

NAME = "amazon-food-kitchen"
FRACTIONS: dict[SplitName, float] = {"profile": 0.5, "train": 0.25, "valid": 0.125, "test": 0.125}
MIN_EVENTS = 6
POWER = 0.75
ROUNDS = 200
REQUIRED_COLUMNS = {
    "interactions.parquet": ("user_id", "item_id", "scenario", "pos"),
    "items.parquet": ("item_id", "scenario", "title"),
}
SCENARIOS = [
    Scenario(
        scenario_id="food",
        name="Grocery and food",
        description=(
            "Shopping for groceries and gourmet food: snacks, drinks, coffee and tea, spices, "
            "baking goods and health food. People buy what they eat and drink, often again."
        ),
    ),
    Scenario(
        scenario_id="kitchen",
        name="Home and kitchen",
        description=(
            "Shopping for the home and the kitchen: cookware, small appliances, tableware, storage "
            "and furnishings. People buy durable goods that fit how they cook and live."
        ),
    ),
]


def prepare_food_kitchen(
    raw: Path | None,
    out: Path,
    negatives: int = 4,
    seed: int = 0,
    both_scenarios: bool = True,
    held_out_users: float = 0.0,
    held_out_valid_users: float = 0.0,
) -> DatasetInfo:
    """Prepare Amazon Food-Kitchen.

    Args:
        raw: folder with interactions.parquet and items.parquet; None: look in the usual places.
        out: dataset directory to create.
        negatives: sampled negatives per positive of train, valid and test.
        seed: seed of the negatives.
        both_scenarios: keep only users with events in both scenarios.
        held_out_users: share of the users of whom nothing is trained, see `SplitInfo`.
        held_out_valid_users: a further share, who validate in place of being tested.

    Raises:
        InputError: not found, columns missing, too few items to sample negatives from.
    """
    if negatives < 1:
        raise InputError(
            f"negatives is {negatives}; at least 1 is needed, the log has positives only"
        )
    source = raw or _find()
    _check_columns(source)
    with output_directory(out) as folder:
        con = connect(folder / "scratch")
        items = _read_items(con, source, folder / "items.parquet")
        positives = _read_positives(con, source, both_scenarios)
        if positives.num_rows == 0:
            raise InputError(f"{source}: no user with {MIN_EVENTS} events or more")
        users = run_codes(positives["user_id"])
        times = positives["timestamp"].to_numpy()
        codes = split_per_user(users, times, list(FRACTIONS.values()))
        codes = hold_out(positives["user_id"], codes, held_out_users, held_out_valid_users)
        sampled = sample_negatives(
            users, encode(positives, items), codes, items.scenarios, negatives, seed
        )
        block, codes = _with_negatives(positives, codes, items, sampled)
        staging = Staging(folder / "scratch" / "staged", event_schema("string", "string", "string"))
        staging.add(block, codes)
        who = "with events in both scenarios" if both_scenarios else "of one or both scenarios"
        split = SplitInfo(
            rule="per_user_time",
            fractions=FRACTIONS,
            held_out_users=held_out_users,
            held_out_valid_users=held_out_valid_users,
            text=SPLIT_TEXT,
        )
        return finish(con, staging, folder, _describe(who, split, negatives, seed))


def _check_columns(source: Path) -> None:
    for file, columns in REQUIRED_COLUMNS.items():
        names = read_footer(source / file)[0].names
        for name in columns:
            if name not in names:
                raise InputError(f"{source / file}: column {name!r} is missing; it has {names}")
            refuse_twins(source / file, names, name)


def _describe(who: str, split: SplitInfo, negatives: int, seed: int) -> DatasetInfo:
    """What dataset.json says; `who`: the users that are kept."""
    return DatasetInfo(
        name=NAME,
        source={
            "kind": "food-kitchen",
            "users": f"{MIN_EVENTS} or more events, {who}",
            "seed": seed,
            "terms": "no licence stated: research use, rows are not to be published",
        },
        scenarios=SCENARIOS,
        user_id_type="string",
        item_id_type="string",
        scenario_id_type="string",
        timestamps="order",
        split=split,
        negatives=Negatives(rule=NEGATIVES_TEXT.format(negatives=negatives, seed=seed)),
        positive_name="bought",
        negative_name=None,
    )


SPLIT_TEXT = (
    "Each user's purchases of both scenarios in their order: first 50% profile, then 25% train, 12.5% "
    "valid, 12.5% test. The log has an order and no clock: the timestamp is the place in the user's "
    "own order (0, 1, 2, …) and cannot be compared between users."
)
NEGATIVES_TEXT = (
    "{negatives} distinct items per positive of train, valid and test, none in profile; same user, "
    "scenario and timestamp; drawn from the scenario's items with probability proportional to "
    "(1 + purchases in profile and train)^0.75; never an item that the user has bought anywhere in the "
    "log, whatever the time; seed {seed}."
)


@dataclass
class Items:
    """The catalogue in the order of item_id; scenarios: int64 [items], 0 food, 1 kitchen."""

    ids: pa.Array
    scenarios: np.ndarray


def _find() -> Path:
    for folder in usual_places(NAME):
        if all((folder / name).is_file() for name in REQUIRED_COLUMNS):
            return folder
    raise InputError(
        f"{NAME} was not found; give the folder of interactions.parquet and items.parquet as --raw "
        "(it cannot be downloaded: its licence is unclear)"
    )


def _read_items(con, source: Path, file: Path) -> Items:  # type: ignore[no-untyped-def]
    """Read the catalogue, write items.parquet (the category is the scenario's name)."""
    import pyarrow.parquet as pq

    raw = source / "items.parquet"
    table = con.execute(
        "SELECT CAST(item_id AS VARCHAR) AS item_id, scenario, coalesce(title, '') AS title "
        f"FROM {parquet_sql([raw])} ORDER BY item_id"
    ).to_arrow_table()
    known = [str(scenario.scenario_id) for scenario in SCENARIOS]
    scenarios = pc.index_in(table["scenario"], pa.array(known)).combine_chunks()
    if scenarios.null_count:
        row = scenarios.is_null().index(True).as_py()
        raise InputError(
            f"{raw}: unknown scenario {table['scenario'][row].as_py()!r}; only {known}"
        )
    runs = run_codes(table["item_id"])
    if table["item_id"].null_count or (len(runs) and int(runs[-1]) + 1 != len(runs)):
        raise InputError(f"{raw}: column 'item_id' has nulls or the same id twice")
    names = pa.array([[scenario.name] for scenario in SCENARIOS], pa.list_(pa.string()))
    # The titles come from web pages and still carry entities such as &amp;.
    titles = [html.unescape(title) for title in table["title"].to_pylist()]
    columns = [table["item_id"].combine_chunks(), pa.array(titles), names.take(scenarios)]
    table = pa.table(columns, schema=pa.schema(item_fields("string")))
    pq.write_table(table, file, write_page_checksum=True)
    return Items(columns[0], scenarios.to_numpy().astype(np.int64))


def _read_positives(con, source: Path, both_scenarios: bool) -> pa.Table:  # type: ignore[no-untyped-def]
    """Purchases of the chosen users, sorted by user and order."""
    file = source / "interactions.parquet"
    columns = "user_id, item_id, scenario, pos"
    missing = " OR ".join(f"{name} IS NULL" for name in columns.split(", "))
    nulls = con.execute(f"SELECT count(*) FROM {parquet_sql([file])} WHERE {missing}").fetchall()
    if nulls[0][0]:
        raise InputError(f"{file}: {nulls[0][0]} rows have a null in {columns}; drop them first")
    scenarios = 2 if both_scenarios else 1
    return con.execute(
        "SELECT CAST(user_id AS VARCHAR) AS user_id, CAST(item_id AS VARCHAR) AS item_id, "
        "scenario AS scenario_id, CAST(pos AS BIGINT) AS timestamp, 1::TINYINT AS label "
        f"FROM {parquet_sql([file])} WINDOW w AS (PARTITION BY user_id) "
        f"QUALIFY count(*) OVER w >= {MIN_EVENTS} "
        f"AND count(DISTINCT scenario) OVER w >= {scenarios} "
        "ORDER BY user_id, timestamp, item_id"
    ).to_arrow_table()


def encode(positives: pa.Table, items: Items) -> np.ndarray:
    """Place of each purchase's item in the catalogue, int64 [n]."""
    places = pc.index_in(positives["item_id"], items.ids)
    if places.null_count:
        name = positives["item_id"].filter(pc.is_null(places))[0].as_py()
        raise InputError(f"interactions.parquet: item {name!r} is not in items.parquet")
    places = places.to_numpy().astype(np.int64)
    known = pa.array([str(scenario.scenario_id) for scenario in SCENARIOS])
    scenarios = pc.index_in(positives["scenario_id"], known)
    if scenarios.null_count or np.any(scenarios.to_numpy() != items.scenarios[places]):
        raise InputError("interactions.parquet: a row's scenario is not that of its item")
    return places


def sample_negatives(
    users: np.ndarray,
    items: np.ndarray,
    codes: np.ndarray,
    scenarios: np.ndarray,
    negatives: int,
    seed: int,
) -> np.ndarray:
    """Draw negatives by the published rule.

    Args:
        users: int64 [n], user of each positive.
        items: int64 [n], item of each positive.
        codes: split of each positive (0 profile … 3 test, 4 introduction).
        scenarios: int64 [items], 0 or 1.
        negatives: number per positive.
        seed: seed.

    Returns:
        Items, int64 [positives of train, valid and test, negatives].
    """
    count = len(scenarios)
    popularity = np.bincount(items[codes <= 1], minlength=count)
    cumulative = np.cumsum((1.0 + popularity) ** POWER * (scenarios[:, None] == [0, 1]).T, axis=1)
    bought = np.unique(users * count + items)
    rows = np.flatnonzero(_sampled_for(codes))
    row_users, kinds = users[rows], scenarios[items[rows]]
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = np.full((len(rows), negatives), -1, dtype=np.int64)
    todo = np.ones_like(drawn, dtype=bool)
    for _ in range(ROUNDS):
        where, column = np.nonzero(todo)
        if len(where) == 0:
            return drawn
        uniform = generator.random(len(where))
        for kind in (0, 1):
            mine = kinds[where] == kind
            places = np.searchsorted(
                cumulative[kind], uniform[mine] * cumulative[kind, -1], side="right"
            )
            drawn[where[mine], column[mine]] = places
        keys = row_users[:, None] * count + drawn
        nearest = np.minimum(np.searchsorted(bought, keys), len(bought) - 1)
        todo = bought[nearest] == keys
        for later in range(1, negatives):
            todo[:, later] |= (drawn[:, :later] == drawn[:, later : later + 1]).any(axis=1)
    raise InputError(
        f"cannot find {negatives} items that a user has not bought; the catalogue is too small"
    )


def _sampled_for(codes: np.ndarray) -> np.ndarray:
    """Which positives get negatives: those of train, valid and test."""
    return (codes > 0) & (codes < 4)


def _with_negatives(
    positives: pa.Table, codes: np.ndarray, items: Items, sampled: np.ndarray
) -> tuple[pa.Table, np.ndarray]:
    """Both together, in the order that staging wants."""
    rows = np.repeat(np.flatnonzero(_sampled_for(codes)), sampled.shape[1])
    false = positives.take(pa.array(rows))
    false = false.set_column(1, "item_id", items.ids.take(pa.array(sampled.reshape(-1))))
    false = false.set_column(4, "label", pa.array(np.zeros(len(rows), dtype=np.int8)))
    block = pa.concat_tables([positives, false]).append_column(
        "code", pa.array(np.concatenate([codes, codes[rows]]))
    )
    keys = ("user_id", "timestamp", "item_id")
    block = block.sort_by([(key, "ascending") for key in keys]).combine_chunks()
    return block.drop_columns("code"), block["code"].to_numpy()
