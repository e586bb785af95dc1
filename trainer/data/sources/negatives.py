"""Negatives for a log of positives, by one published rule.

Each positive of train, valid and test gets `per_positive` distinct items of the same user, scenario and
time, label 0. An item is drawn from those that occur in the scenario, with probability proportional to
(1 + its positives there in profile and train) ^ power. An item that the user has had a positive of until
then is not drawn. What the user buys later may be drawn: a rule that left it out would tell the model what
is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llm_knowledge.errors import InputError
from trainer.data.sources.log_schema import LogNegatives

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROUNDS = 20  # of drawing anew what may not be drawn, before the rest is drawn from what is left


def negatives_rule(rules: LogNegatives) -> str:
    """The rule in words, for dataset.json."""
    when = "until then" if rules.avoid == "earlier" else "anywhere in the log, whatever the time"
    return (
        f"{rules.per_positive} distinct items per positive of train, valid and test, none in profile; same "
        "user, scenario and timestamp; drawn from the items that occur in the scenario with probability "
        f"proportional to (1 + positives there in profile and train)^{rules.power:g}; never an item that the "
        f"user has had a positive of {when}; seed {rules.seed}."
    )


def sampled_for(codes: np.ndarray) -> np.ndarray:
    """Which rows get negatives, bool [n]: those of train, valid and test, by split code (0..4)."""
    return (codes > 0) & (codes < 4)


class NegativeSampler:
    """Draws negatives block by block; a block holds all events of some users, sorted by user and time.

    Memory: about 24 bytes for each item of each scenario.

    Args:
        con: Connection.
        events: SQL of the log's events, all of them positive.
        scenarios: The scenario ids.
        rules: What to sample.
    """

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        events: str,
        scenarios: Sequence[int | str],
        rules: LogNegatives,
    ) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        assert rules.per_positive is not None
        self._rules, self._count = rules, rules.per_positive
        items = con.execute(f"SELECT DISTINCT item_id FROM {events} ORDER BY 1").to_arrow_table()
        self._items: pa.Array = items["item_id"].combine_chunks()
        pairs = con.execute(f"SELECT DISTINCT scenario_id, item_id FROM {events}").to_arrow_table()
        self._scenarios = pa.array(scenarios, pairs["scenario_id"].type)
        numbers = pc.index_in(pairs["scenario_id"], self._scenarios).to_numpy().astype(np.int64)
        places = pc.index_in(pairs["item_id"], self._items).to_numpy().astype(np.int64)
        # Scenario and item in one number, sorted: a scenario's items are one stretch.
        self._pairs = np.sort(numbers * len(self._items) + places)
        self._positives = np.zeros(len(self._pairs), dtype=np.int64)
        self._cumulative: np.ndarray | None = None

    def count(self, block: pa.Table, codes: np.ndarray) -> None:
        """Counts the positives of profile and train; to be called for all blocks before any is sampled."""
        scenario, item = self._encode(block)
        pairs = (scenario * len(self._items) + item)[codes <= 1]
        np.add.at(self._positives, np.searchsorted(self._pairs, pairs), 1)

    def add(
        self,
        block: pa.Table,
        codes: np.ndarray,
        moments: np.ndarray,
        users: np.ndarray,
        number: int,
    ) -> tuple[pa.Table, np.ndarray]:
        """Puts negatives between the positives of a block.

        Args:
            block: Columns of an event but `history`, sorted by user and time.
            codes: Split of each row.
            moments: Number that grows with the user's own time, int64 [n].
            users: Number of each row's user, int64 [n].
            number: Of the block; with the seed it decides what is drawn.

        Returns:
            The block and its codes, in order of user, time and item.

        Raises:
            InputError: A scenario has too few items that a user has not had.
        """
        import pyarrow as pa

        rows = np.flatnonzero(sampled_for(codes))
        drawn = self._draw(block, rows, moments, users, number)
        copies = np.repeat(rows, self._count)
        negatives = block.take(pa.array(copies))
        zeros = pa.array(np.zeros(len(copies), dtype=np.int8))
        for index, name in enumerate(block.column_names):
            if name == "item_id":
                negatives = negatives.set_column(
                    index, name, self._items.take(pa.array(drawn.reshape(-1)))
                )
            elif name.startswith("label"):
                negatives = negatives.set_column(index, name, zeros.cast(block[name].type))
        both = pa.concat_tables([block, negatives]).append_column(
            "code", pa.array(np.concatenate([codes, codes[copies]]))
        )
        keys = ("user_id", "timestamp", "fraction", "item_id", "scenario_id", "label")
        both = both.sort_by([(key, "ascending") for key in keys if key in both.column_names])
        return both.drop_columns("code").combine_chunks(), both["code"].to_numpy()

    def _encode(self, block: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Number of each row's scenario and item, int64 [n]."""
        import pyarrow.compute as pc

        return (
            pc.index_in(block["scenario_id"], self._scenarios).to_numpy().astype(np.int64),
            pc.index_in(block["item_id"], self._items).to_numpy().astype(np.int64),
        )

    def _draw(
        self, block: pa.Table, rows: np.ndarray, moments: np.ndarray, users: np.ndarray, number: int
    ) -> np.ndarray:
        """Items for some rows of a block, int64 [rows, per_positive]."""
        if self._cumulative is None:
            self._cumulative = np.cumsum((1.0 + self._positives) ** self._rules.power)
        scenario, item = self._encode(block)
        had, first = np.unique(users * len(self._items) + item, return_index=True)
        since = moments[first]  # rows of a user are in order of time
        if self._rules.avoid == "all":
            since = np.full_like(since, np.iinfo(np.int64).min)

        def forbidden(row: np.ndarray, items: np.ndarray) -> np.ndarray:
            key = users[row] * len(self._items) + items
            nearest = np.minimum(np.searchsorted(had, key), len(had) - 1)
            return (had[nearest] == key) & (since[nearest] <= moments[row])

        generator = np.random.Generator(np.random.Philox([self._rules.seed, number]))
        drawn = np.full((len(rows), self._count), -1, dtype=np.int64)
        todo = np.ones_like(drawn, dtype=bool)
        bounds = np.searchsorted(
            self._pairs, np.arange(len(self._scenarios) + 1) * len(self._items)
        )
        for _ in range(ROUNDS):
            where, column = np.nonzero(todo)
            if len(where) == 0:
                return drawn
            of = scenario[rows[where]]
            below = np.where(bounds[of] > 0, self._cumulative[bounds[of] - 1], 0.0)
            above = self._cumulative[bounds[of + 1] - 1]
            target = below + generator.random(len(where)) * (above - below)
            pick = np.searchsorted(self._cumulative, target, side="right")
            pick = np.clip(pick, bounds[of], bounds[of + 1] - 1)
            drawn[where, column] = self._pairs[pick] - of * len(self._items)
            todo = forbidden(np.repeat(rows[:, None], self._count, axis=1), drawn)
            for later in range(1, self._count):
                todo[:, later] |= (drawn[:, :later] == drawn[:, later : later + 1]).any(axis=1)
        weights = np.diff(self._cumulative, prepend=0.0)
        for sample in np.flatnonzero(todo.any(axis=1)):
            row, open_ = rows[sample], todo[sample]
            stretch = slice(bounds[scenario[row]], bounds[scenario[row] + 1])
            items = self._pairs[stretch] - scenario[row] * len(self._items)
            free = ~forbidden(np.full(len(items), row), items) & ~np.isin(
                items, drawn[sample, ~open_]
            )
            if free.sum() < open_.sum():
                raise self._too_few(block, int(row))
            share = weights[stretch][free] / weights[stretch][free].sum()
            drawn[sample, open_] = generator.choice(
                items[free], open_.sum(), replace=False, p=share
            )
        return drawn

    def _too_few(self, block: pa.Table, row: int) -> InputError:
        user, scenario = block["user_id"][row].as_py(), block["scenario_id"][row].as_py()
        return InputError(
            f"negatives.per_positive: {self._count} items cannot be sampled for user {user!r} in scenario "
            f"{scenario!r}: it has too few items that the user has not had; ask for fewer, or leave the "
            "scenario out"
        )
