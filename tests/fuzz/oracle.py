"""What a prepared dataset must hold, worked out row by row in plain Python: slow and obvious."""

import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

SPLITS = ("profile", "train", "valid", "test")
HISTORY_LENGTH = 20
Row = dict[
    str, Any
]  # user_id, item_id, scenario_id, microseconds, label, and label_NAME of further ones


@dataclass(frozen=True)
class Rule:
    """How events are divided by time, as in the schema file."""

    name: str
    fractions: dict[str, float]
    boundaries: list[int] | None = None
    held_out_users: float = 0.0
    held_out_valid_users: float = 0.0


def order(value: Any) -> Any:
    """Strings are ordered by their UTF-8 bytes, as DuckDB does."""
    return value.encode() if isinstance(value, str) else value


def event_key(row: Row) -> tuple[Any, ...]:
    names = ("microseconds", "user_id", "item_id", "scenario_id", "label")
    return tuple(order(row[name]) for name in names)


def history(row: Row, of_user: list[Row]) -> list[Any]:
    """The last items that the user liked strictly before this event, oldest first."""
    before = [
        other for other in of_user if other["label"] and other["microseconds"] < row["microseconds"]
    ]
    return [other["item_id"] for other in sorted(before, key=event_key)][-HISTORY_LENGTH:]


def seconds(row: Row) -> int:
    return row["microseconds"] // 1_000_000


def split_of_user(row: Row, of_user: list[Row], fractions: dict[str, float]) -> int:
    """A group of simultaneous events goes whole to where its middle falls in the user's events."""
    earlier = sum(seconds(other) < seconds(row) for other in of_user)
    together = sum(seconds(other) == seconds(row) for other in of_user)
    middle = (2 * earlier + together) / (2 * len(of_user))
    cuts = [round(cut, 12) for cut in accumulate(fractions[name] for name in SPLITS)][:3]
    return sum(middle >= cut for cut in cuts)


def boundaries(rows: list[Row], rule: Rule) -> list[int]:
    """First seconds of train, valid and test."""
    if rule.boundaries is not None:
        return rule.boundaries
    times = sorted(seconds(row) for row in rows)
    shares = [sum(rule.fractions[name] for name in SPLITS[: n + 1]) for n in range(3)]
    return [times[min(round(len(times) * share), len(times) - 1)] for share in shares]


def dataset(rows: list[Row], rule: Rule) -> dict[str, list[Row]] | None:
    """Every split's rows, in order of time; None where a split would be empty, which is refused."""
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row)
    bounds = boundaries(rows, rule) if rule.name == "global_time" else []
    splits: dict[str, list[Row]] = {name: [] for name in (*SPLITS, "introduction")}
    for row in sorted(rows, key=event_key):
        of_user = by_user[row["user_id"]]
        if rule.name == "global_time":
            code = sum(seconds(row) >= bound for bound in bounds)
        else:
            code = split_of_user(row, of_user, rule.fractions)
            place = zlib.crc32(f"held out {row['user_id']}".encode()) / 2**32
            if place < rule.held_out_users + rule.held_out_valid_users:
                later = 3 if place < rule.held_out_users else 2
                code = 4 if code == 0 else later
        made = {name: value for name, value in row.items() if name != "microseconds"}
        made |= {"timestamp": seconds(row), "history": history(row, of_user)}
        splits[(*SPLITS, "introduction")[code]].append(made)
    introduced = splits.pop("introduction")
    if not all(splits.values()):
        return None
    if rule.held_out_users + rule.held_out_valid_users > 0:
        if not introduced:
            return None
        splits["introduction"] = introduced
    return splits


def items(rows: list[Row], catalogue: list[Row] | None) -> list[Row]:
    """Items of the log and of the catalogue; one without an entry has no title and no category."""
    known = {entry["item_id"]: entry for entry in catalogue or []}
    ids = {row["item_id"] for row in rows} | set(known)
    return [
        {
            "item_id": item,
            "title": known.get(item, {}).get("title") or "",
            "categories": [c for c in known.get(item, {}).get("categories") or [] if c],
        }
        for item in sorted(ids, key=order)
    ]


def have_texts(known: list[Row], rows: list[Row]) -> bool:
    """Whether any item of the log has a title or a category."""
    logged = {row["item_id"] for row in rows}
    return any(item["title"] or item["categories"] for item in known if item["item_id"] in logged)


def same(one: list[Row], other: list[Row]) -> bool:
    """Equal rows, equally often; in order of time, in which simultaneous events may change places."""

    def counted(rows: list[Row]) -> Counter[str]:
        return Counter(repr(sorted(row.items())) for row in rows)

    return counted(one) == counted(other)
