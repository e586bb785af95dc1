"""A multi-scenario log with planted truth: tastes, topics, readable titles, a known best AUC.

A user has a taste per topic; an item has a main and a second topic; a scenario has a base rate, likes
some topics better than others, and stretches tastes in its own way:

    logit = base_s + bias_s·v_i + STRENGTH * (taste_u * stretch_s)·v_i + quality_i
    truth_probability = sigmoid(logit),   label ~ Bernoulli(truth_probability)

Written in constant memory: whatever belongs to a user or an item is a hash of its id, so nothing is kept
per user or item; events are made in blocks of users, which carry their whole history, and are brought
into order of time out of core. Bound: one block (about `BLOCK_EVENTS` events or 65,536 users, or the
events of one user if more), about 1 KiB per event of a block, plus DuckDB's limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    DatasetInfo,
    Scenario,
    SplitInfo,
    SplitName,
    Truth,
    event_schema,
    item_fields,
)
from trainer.data.sources.simulated_texts import SCENARIO_TEXTS, TOPICS
from trainer.data.sources.staging import Staging, finish, progress, split_global
from trainer.data.sources.writer import connect, output_directory, write_info

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

BLOCK_EVENTS = 500_000
BLOCK_USERS = 65_536
START = 1_735_689_600  # 1 January 2025, UTC
DAY = 86_400
FRACTIONS: dict[SplitName, float] = {"profile": 0.4, "train": 0.4, "valid": 0.1, "test": 0.1}
STRENGTH = 1.35
SLOTS = 4  # a user is in at most so many scenarios
SLOT_SHARES = (0.4, 0.3, 0.2, 0.1)
NEW_SHARE = 0.25  # of users in several scenarios, those who meet one of them after training only
LIKED_TOPICS = 3
AUC_BINS = 65_536

Block = dict[str, np.ndarray]


@dataclass(frozen=True)
class World:
    """Everything that is not per user or item; topics are the columns.

    base: float64 [scenarios]; bias, stretch: float64 [scenarios, topics]; reach: float64 [scenarios],
    cumulative share of users; new_from: the second from which the late scenarios exist for new users.
    """

    users: int
    items: int
    seed: int
    base: np.ndarray
    bias: np.ndarray
    stretch: np.ndarray
    reach: np.ndarray
    new_from: int


def simulate(
    out: Path,
    users: int,
    items: int,
    scenarios: int,
    events: int,
    seed: int = 0,
    days: int = 30,
    memory: str = "2GB",
) -> DatasetInfo:
    """Write a simulated log as a prepared dataset; the same arguments give the same rows.

    Args:
        out: dataset directory to create.
        users: number of users (those with no event do not appear).
        items: number of items in the catalogue.
        scenarios: number of scenarios.
        events: number of events, exactly.
        seed: seed of everything.
        days: length of the log; the split is by time: 40/40/10/10 % of the days.
        memory: DuckDB's limit; beyond it, it spills beside `out`.

    Raises:
        InputError: a size is too small, a split would be empty, `out` cannot be written.
    """
    sizes = {"users": users, "items": items, "scenarios": scenarios, "events": events, "days": days}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} is {value}; must be at least 1")
        if name != "events" and value >= 2**31:
            raise InputError(f"{name} is {value}; must be below 2^31")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; must be from 0 to 2^63 - 1")
    passed = np.cumsum(list(FRACTIONS.values()))[:3]
    boundaries = [START + int(days * DAY * round(share, 6)) for share in passed]
    world = _world(users, items, scenarios, seed, boundaries[1])
    with output_directory(out) as folder:
        schema = event_schema("int64", "int64", "int64", ["truth_probability"])
        staging = Staging(folder / "scratch" / "staged", schema)
        per_user = max(1.0, events / users)
        size = int(min(BLOCK_USERS, max(1, BLOCK_EVENTS // per_user)))
        for first in progress(range(0, users, size), "events"):
            last = min(first + size, users)
            # Whole-number shares of the events, so that the blocks sum to exactly `events`.
            count = events * last // users - events * first // users
            if count:
                block = _block(world, first, last, count, days)
                staging.add(_table(block, schema), split_global(block["timestamp"], boundaries))
        _write_items(world, folder / "items.parquet")
        con = connect(folder / "scratch", memory)
        info = finish(con, staging, folder, _info(sizes, seed, boundaries))
        return write_info(folder, info.model_copy(update={"truth": _truth(con, folder, scenarios)}))


def _info(sizes: dict[str, int], seed: int, boundaries: list[int]) -> DatasetInfo:
    texts = []
    for number in range(sizes["scenarios"]):
        name, text = SCENARIO_TEXTS[number % len(SCENARIO_TEXTS)]
        again = number // len(SCENARIO_TEXTS)
        name = f"{name} {again + 1}" if again else name
        texts.append(Scenario(scenario_id=number + 1, name=name, description=text))
    return DatasetInfo(
        name="simulated",
        source={"kind": "simulate", "seed": seed, "strength": STRENGTH, **sizes},
        scenarios=texts,
        user_id_type="int64",
        item_id_type="int64",
        scenario_id_type="int64",
        split=SplitInfo(
            rule="global_time",
            fractions=FRACTIONS,
            boundaries=boundaries,
            text=f"One cut for all users by time over {sizes['days']} days: 40% profile, 40% train, "
            "10% valid, 10% test.",
        ),
        positive_name="liked",
        negative_name="disliked",
    )


# ---------------------------------------------------------------- parameters as hashes of ids


def _uniform(seed: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, stream, id) only: SplitMix64."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(stream)
        state = _mix(np.atleast_1d(key)) + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(state) >> np.uint64(11)) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _world(users: int, items: int, scenarios: int, seed: int, new_from: int) -> World:
    generator = np.random.Generator(np.random.Philox([seed, 0]))
    shape = (scenarios, len(TOPICS))
    reach = np.cumsum((1.0 + np.arange(scenarios)) ** -0.5)
    return World(
        users=users,
        items=items,
        seed=seed,
        base=-0.5 + 1.0 * (generator.permutation(scenarios) / max(1, scenarios - 1) - 0.5),
        bias=0.4 * generator.standard_normal(shape),
        stretch=np.exp(0.5 * generator.standard_normal(shape)),
        reach=reach / reach[-1],
        new_from=new_from,
    )


def tastes(world: World, users: np.ndarray) -> np.ndarray:
    """Taste of users [n] for topics: float64 [n, topics]; about three topics are liked."""
    topics = len(TOPICS)
    ids = users[:, None].astype(np.uint64) * np.uint64(topics) + np.arange(topics, dtype=np.uint64)
    draw = _uniform(world.seed, 1, ids)
    rank = draw.argsort(axis=1).argsort(axis=1)
    return np.where(rank < LIKED_TOPICS, 1.3, -0.6) + 0.8 * (_uniform(world.seed, 2, ids) - 0.5)


def item_topics(world: World, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Main topic, second topic (another one), quality of items [n], by zero-based item number."""
    topics = len(TOPICS)
    main = (_uniform(world.seed, 3, items) * topics).astype(np.int64)
    step = 1 + (_uniform(world.seed, 4, items) * (topics - 1)).astype(np.int64)
    quality = 0.8 * (_uniform(world.seed, 5, items) - 0.5)
    return main, (main + step) % topics, quality


def _slots(world: World, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scenarios of users, int64 [n, SLOTS] (the first is home, repeats allowed); is slot 1 late, bool [n].

    A late scenario is one that the user meets only after the training window.
    """
    ids = users[:, None].astype(np.uint64) * np.uint64(SLOTS) + np.arange(SLOTS, dtype=np.uint64)
    slots = np.searchsorted(world.reach, _uniform(world.seed, 6, ids), side="right")
    slots = np.minimum(slots, len(world.reach) - 1)
    slots[:, 2:] = np.where(_uniform(world.seed, 7, ids[:, 2:]) < 0.5, slots[:, :1], slots[:, 2:])
    late = (slots[:, 1] != slots[:, 0]) & (_uniform(world.seed, 8, users) < NEW_SHARE)
    clash = late[:, None] & (slots[:, 2:] == slots[:, 1:2])
    slots[:, 2:] = np.where(clash, slots[:, :1], slots[:, 2:])
    return slots, late


# ---------------------------------------------------------------- events


def _block(world: World, first: int, last: int, count: int, days: int) -> Block:
    """All events of the users first..last-1, sorted by user, time, item."""
    draw = np.random.Generator(np.random.Philox([world.seed, 1 + first]))
    users = np.arange(first, last)
    # Log-normal activity: some users come daily, many rarely.
    weight = np.exp(0.7 * draw.standard_normal(len(users)))
    per_user = draw.multinomial(count, weight / weight.sum())
    row = np.repeat(np.arange(len(users)), per_user)
    # Most events fall into the afternoon and evening.
    clock = (draw.random(count) ** 0.6 * DAY).astype(np.int64)
    time = START + draw.integers(0, days, count) * DAY + clock
    slots, late = _slots(world, users)
    slot = np.searchsorted(np.cumsum(SLOT_SHARES), draw.random(count), side="right")
    slot = np.minimum(slot, SLOTS - 1)
    slot[late[row] & (slot == 1) & (time < world.new_from)] = 0
    scenario = slots[row, slot]
    taste = tastes(world, users)
    one, two = _popular(world, draw, count), _popular(world, draw, count)
    # Half of the events show what the user rather likes, as a recommender would.
    better = _affinity(world, taste, row, two) > _affinity(world, taste, row, one)
    item = np.where(better & (draw.random(count) < 0.5), two, one)
    chance = _chance(world, taste, row, scenario, item)
    order = np.lexsort((scenario, item, time, row))
    columns = {
        "user_id": users[row] + 1,
        "item_id": item + 1,
        "scenario_id": scenario + 1,
        "timestamp": time,
        "label": (draw.random(count) < chance).astype(np.int8),
        "truth_probability": chance.astype(np.float32),
    }
    return {name: column[order] for name, column in columns.items()}


def _popular(world: World, draw: np.random.Generator, count: int) -> np.ndarray:
    """Zero-based item numbers, heavy-tailed; the popular ones are spread over the numbers."""
    rank = (world.items * draw.random(count) ** 2.0).astype(np.int64)
    step = int(world.items * 0.618) + 1
    while math.gcd(step, world.items) != 1:
        step += 1
    return rank * step % world.items


def _affinity(world: World, taste: np.ndarray, row: np.ndarray, item: np.ndarray) -> np.ndarray:
    main, second, _ = item_topics(world, item)
    return taste[row, main] + 0.5 * taste[row, second]


def _chance(
    world: World, taste: np.ndarray, row: np.ndarray, scenario: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """Probability of a like, float64 [n]; an item is 0.9 of its main and 0.45 of its second topic."""
    main, second, quality = item_topics(world, item)
    logit = world.base[scenario] + quality
    for topic, share in ((main, 0.9), (second, 0.45)):
        pull = STRENGTH * taste[row, topic] * world.stretch[scenario, topic]
        logit += share * (pull + world.bias[scenario, topic])
    return 1.0 / (1.0 + np.exp(-logit))


def _table(block: Block, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    names = [name for name in schema.names if name != "history"]
    return pa.table({name: block[name] for name in names})


# ---------------------------------------------------------------- items and truth


def _write_items(world: World, file: Path) -> None:
    """Titles from topic words; beyond 2,000 items a model number keeps them apart."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    words = [[part.split(",") for part in topic] for topic in TOPICS.values()]
    names = pa.array([[name] for name in TOPICS], pa.list_(pa.string()))
    schema = pa.schema(item_fields("int64"))
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for first in range(0, world.items, BLOCK_USERS):
            ids = np.arange(first, min(first + BLOCK_USERS, world.items))
            main, second, _ = item_topics(world, ids)
            parts = []
            for position, topic in ((0, main), (1, main), (2, second)):
                lists = [topic_words[position] for topic_words in words]
                width = len(lists[0])
                pick = (_uniform(world.seed, 10 + position, ids) * width).astype(np.int64)
                flat = pa.array([word for row in lists for word in row])
                parts.append(flat.take(pa.array(topic * width + pick)))
            title = pc.binary_join_element_wise(parts[0], parts[1], "with", parts[2], " ")
            if world.items > 2_000:
                number = pc.cast(pa.array(ids + 1), pa.string())
                title = pc.binary_join_element_wise(title, number, ", model ")
            columns = [pa.array(ids + 1), title, names.take(pa.array(main))]
            writer.write_table(pa.table(columns, schema=schema))


def _truth(con: duckdb.DuckDBPyConnection, folder: Path, scenarios: int) -> Truth:
    """AUC of the true probability against the drawn labels of test, from 65,536 bins of it."""
    files = sorted((folder / "test").iterdir())
    rows = con.execute(
        f"SELECT scenario_id, CAST(truth_probability * {AUC_BINS - 1} AS INTEGER) AS bin, "
        f"sum(label)::BIGINT, count(*) FROM {parquet_sql(files)} GROUP BY ALL"
    ).fetchnumpy()
    scenario, bins, good, total = (np.asarray(column) for column in rows.values())

    def auc(mask: np.ndarray) -> float | None:
        positive = np.bincount(bins[mask], good[mask], AUC_BINS)
        negative = np.bincount(bins[mask], (total - good)[mask], AUC_BINS)
        pairs = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative / 2
        return float(positive @ below / pairs) if pairs else None

    values = {"overall": auc(np.ones(len(bins), dtype=bool))}
    values |= {str(number): auc(scenario == number) for number in range(1, scenarios + 1)}
    return Truth(
        bayes_auc={name: value for name, value in values.items() if value is not None},
        text="AUC of truth_probability against the drawn labels of the test split: what the best possible "
        "model would get there. A scenario whose test events have one class only is left out.",
    )
