"""Tables of users and items, joined as of the event: strictly earlier, one row at a time, or refused."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.feature_data import SCHEMA, raw_log, write_raw
from tests.helpers.log_data import all_rows
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet

START = 1_700_000_000


def users_table(rows: int = 80, seed: int = 1) -> dict[str, list]:
    """Several rows of most users; some begin in the very second of an event."""
    draw = np.random.default_rng(seed)
    times = raw_log()[0]["timestamp"]
    since = np.array(
        [START - 1, *draw.choice(times, rows), *(START + draw.integers(0, 10**6, rows))]
    )
    pairs = sorted({(int(u), int(t)) for t in since for u in draw.integers(0, 28, 1)})
    return {
        "customer": [user for user, _ in pairs],
        "valid_from": [time for _, time in pairs],
        "town": [None if n % 7 == 0 else f"town {n}" for n in range(len(pairs))],
        "income": [float(n) for n in range(len(pairs))],
    }


def schema_with_users(**users: object) -> dict:
    schema = deepcopy(SCHEMA) | {
        "users": {"path": "users.parquet", "user_id": "customer", "since": "valid_from"} | users,
    }
    schema["features"]["town"] = {"kind": "id", "from": "users"}
    schema["features"]["income"] = {"kind": "number", "from": "users"}
    return schema


def write(folder: Path, log: dict, catalogue: dict, schema: dict, users: dict) -> tuple[Path, Path]:
    raw, rules = write_raw(folder, log, catalogue, schema)
    pq.write_table(pa.table(users), folder / "users.parquet")
    return raw, rules


def test_users_are_joined_as_of_the_event(tmp_path: Path) -> None:
    log, catalogue = raw_log()
    users = users_table()
    raw, rules = write(tmp_path / "raw", log, catalogue, schema_with_users(), users)
    prepare_parquet(raw, tmp_path / "out", rules)
    rows = all_rows(tmp_path / "out")
    meetings = 0
    table = list(
        zip(users["customer"], users["valid_from"], users["town"], users["income"], strict=True)
    )
    for row in rows:
        earlier = [one for one in table if one[0] == row["user_id"] and one[1] < row["timestamp"]]
        newest = max(earlier, key=lambda one: one[1], default=(0, 0, None, None))
        assert (row["feature_town"], row["feature_income"]) == newest[2:]
        meetings += any(one[:2] == (row["user_id"], row["timestamp"]) for one in table)
    assert len(rows) == 2_000
    assert meetings > 0


def test_items_may_have_rows_over_time_and_keep_their_first_text(tmp_path: Path) -> None:
    log, catalogue = raw_log()
    schema = deepcopy(SCHEMA)
    schema["catalogue"]["since"] = "valid_from"
    del schema["features"]["price"]["timeless"]
    count = len(catalogue["sku"])
    catalogue = {name: values * 2 for name, values in catalogue.items()} | {
        "title": [f"Thing {i}" for i in range(count)] + [f"Later {i}" for i in range(count)],
        "price": [float(i) for i in range(2 * count)],
        "valid_from": [0] * count + [START + 500_000] * count,
    }
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    prepare_parquet(raw, tmp_path / "out", rules)
    for row in all_rows(tmp_path / "out"):
        price = row["item_id"] + (count if row["timestamp"] > START + 500_000 else 0)
        assert row["feature_price"] == (price if row["item_id"] < count else None)
    titles = pq.read_table(tmp_path / "out" / "items.parquet")["title"].to_pylist()
    assert {title.split()[0] for title in titles if title} == {"Thing"}


def test_an_appended_day_joins_as_one_preparation_of_both(tmp_path: Path) -> None:
    log, catalogue = raw_log()
    schema = schema_with_users() | {"split": {"rule": "global_time"}}
    cut = 1_400
    while log["timestamp"][cut] == log["timestamp"][cut - 1]:
        cut += 1
    prepared = []
    for name, part in (("whole", slice(None)), ("base", slice(cut)), ("day", slice(cut, None))):
        chosen = {column: values[part] for column, values in log.items()}
        raw, rules = write(tmp_path / f"raw-{name}", chosen, catalogue, schema, users_table())
        if name == "day":
            append_parquet(raw, tmp_path / "base", tmp_path / "day", rules)
        else:
            prepare_parquet(raw, tmp_path / name, rules)
        prepared.append(sorted(repr(row | {"split": None}) for row in all_rows(tmp_path / name)))
    assert prepared[0] == prepared[2]


def users_column(name: str, row: int, value: object) -> Callable[[dict, dict], None]:
    return lambda users, schema: users[name].__setitem__(row, value)


def twice(users: dict, schema: dict) -> None:
    for values in users.values():
        values.append(values[4])


BAD: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "two rows of one time": (
        twice, r"users\.parquet: column 'customer', row 5 .*2 rows of one customer and valid_from",
    ),
    "two rows of a user": (
        lambda users, schema: (
            schema["users"].pop("since"), schema["features"]["income"].update(timeless=True)
        ),
        r"column 'customer', row \d+ .*rows of one customer",
    ),
    "no time": (users_column("valid_from", 2, None), r"column 'valid_from', row 3 .*null"),
    "no user": (users_column("customer", 2, None), r"column 'customer', row 3 .*null"),
    "milliseconds": (
        users_column("valid_from", 2, START * 1_000), r"'valid_from', row 3 .*after the year 5000",
    ),
    "a number for all times": (
        lambda users, schema: schema["users"].pop("since"), "features.income: a number of a table .*timeless",
    ),
    "timeless and dated": (
        lambda users, schema: schema["features"]["income"].update(timeless=True),
        "features.income: timeless goes with",
    ),
    "no such column": (
        lambda users, schema: schema["users"].update(since="valid_form"), "did you mean 'valid_from'",
    ),
    "ids as text": (
        lambda users, schema: users.update(customer=[str(u) for u in users["customer"]]),
        r"column 'customer' is string, but the log's ids are int64",
    ),
    "others' ids": (
        lambda users, schema: users.update(customer=[u + 1_000 for u in users["customer"]]),
        "none of the ids is in the log",
    ),
    "no table": (lambda users, schema: schema.pop("users"), "from users, but the schema has no users"),
    "no clock": (
        lambda users, schema: schema.update(columns={"timestamp": "none"}), "since: the log has no clock",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused(tmp_path: Path, case: str) -> None:
    change, says = BAD[case]
    users, schema = users_table(), schema_with_users()
    change(users, schema)
    raw, rules = write(tmp_path / "raw", *raw_log(300), schema, users)
    with pytest.raises(InputError, match=says):
        prepare_parquet(raw, tmp_path / "out", rules)
    assert not (tmp_path / "out").exists()
