"""A first schema of somebody's log, drafted from its files: roles and kinds are guessed, with the reason."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError
from trainer.data.sources.column_profile import (
    ColumnProfile,
    label_auc,
    profile_columns,
    separator_of,
)
from trainer.data.sources.feature_schema import RESERVED
from trainer.data.sources.log_checks import CLOCK_FROM, CLOCK_TO, UNITS
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

# Names of columns in public logs, without case and separators, the likeliest first.
NAMES = {
    "user_id": "userid user customerid customer uid visitorid memberid reviewerid accountid account",
    "item_id": "itemid item videoid productid sku movieid asin parentasin photoid newsid docid goodsid "
    "adid iid",
    "scenario_id": "scenarioid scenario domainid domain tab scene channel surface pageid page country",
    "timestamp": "timestamp time timems ts eventtime datetime clicktime createdat date",
    "label": "label isclick click clicked islike liked like target y",
    "since": "since validfrom from updatedat starttime timestamp",
    "title": "title name caption itemname",
    "categories": "categories category genres genre",
}
FURTHER_LABELS = re.compile(
    r"(?:is_?)?(click|like|follow|share|forward|comment|buy|bought|purchase|pay|cart|order|long_view|hate)"
)
KINDS = {
    "user_id": ("int64", "string"),
    "item_id": ("int64", "string"),
    "scenario_id": ("int64", "string"),
    "timestamp": ("int64", "time"),
    "since": ("int64", "time"),
    "title": ("string",),
    "categories": ("string", "list of string"),
}
MOST_SCENARIOS = 64
FEW_VALUES = 1_000  # integers of so many different values are ids
FEW_TEXTS = 50  # texts of so many different ones are ids, however short the log
LEAK = 0.95  # AUC of the label by one column alone
FILL = "FILL_ME_IN"


@dataclass
class Draft:
    """What is written of the features so far.

    Attributes:
        features: Lines of the section features.
        ignored: Lines of the section ignore.
        names: Names of features, none is given twice.
    """

    features: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def ignore(self, column: ColumnProfile, why: str) -> None:
        """Leaves a column out, and says why."""
        # As a pattern the name stands for itself.
        pattern = re.sub(r"([*?[])", r"[\1]", column.name)
        self.ignored.append(f"  - {scalar(pattern)}  # {why}; {column.describe()}")

    def add(self, column: ColumnProfile, source: str, options: dict[str, Any], why: str) -> None:
        """Declares a feature."""
        name = re.sub(r"[^a-z0-9]+", "_", column.name.lower()).strip("_")
        name = name if re.match("[a-z]", name) else f"column_{name}"
        while name in self.names or name in RESERVED:
            name += "_of_" + {"users": "user", "catalogue": "item"}.get(source, "event")
        self.names.add(name)
        given = {} if source == "log" else {"from": source}
        given |= {} if name == column.name else {"column": column.name}
        entry = ", ".join(f"{key}: {scalar(value)}" for key, value in (options | given).items())
        self.features.append(f"  {scalar(name)}: {{{entry}}}  # {why}; {column.describe()}")


def draft_schema(
    con: duckdb.DuckDBPyConnection,
    log: Path,
    users: Path | None,
    catalogue: Path | None,
    base: Path,
) -> str:
    """Drafts the schema of a log.

    Args:
        con: Connection for the queries.
        log: A Parquet file, or a folder of them.
        users: The same of users, or None.
        catalogue: The same of items, or None.
        base: Folder that the schema will lie in; tables are named from there.

    Returns:
        YAML with comments, which `prepare parquet` takes once it is edited.

    Raises:
        InputError: A file cannot be read, or holds no rows.
    """
    raw = RawFiles.open(log)
    if raw.rows == 0:
        raise InputError(f"{log}: the log has no rows, so nothing can be guessed")
    columns = profile_columns(con, raw)
    roles = _roles(columns)
    draft = Draft()
    sections = [_head(raw, columns), *_columns(columns, roles)]
    sections += _scenarios(con, raw, roles.get("scenario_id"))
    labels = _features_of_log(con, raw, columns, roles, draft)
    for name, path, key in (("catalogue", catalogue, "item_id"), ("users", users, "user_id")):
        if path is not None:
            sections += _table(con, name, path, key, roles.get(key), base, draft)
    if labels:
        sections += ["labels:", *labels]
    sections += ["features:", *draft.features] if draft.features else []
    sections += ["ignore:", *draft.ignored] if draft.ignored else []
    return "\n".join(sections) + "\n"


# ---------------------------------------------------------------- roles


def _roles(columns: Sequence[ColumnProfile]) -> dict[str, ColumnProfile]:
    """Column of each role that can be guessed."""
    roles: dict[str, ColumnProfile] = {}
    for role in ("user_id", "item_id", "timestamp", "label", "scenario_id"):
        left = [one for one in columns if one not in roles.values() and not one.types]
        if role == "label":
            left = [one for one in left if one.is_binary]
        elif role == "scenario_id":
            left = [one for one in left if one.distinct <= MOST_SCENARIOS and not one.nulls]
        guess = _by_name(role, left)
        if guess is None and role == "label" and len(left) == 1:
            guess = left[0]
        if guess is None and role == "timestamp":
            times = [one for one in left if one.kind == "time"]
            guess = times[0] if len(times) == 1 else None
        if guess is not None:
            roles[role] = guess
    return roles


def _by_name(role: str, columns: Sequence[ColumnProfile]) -> ColumnProfile | None:
    plain = {re.sub(r"[^a-z0-9]", "", one.name.lower()): one for one in reversed(columns)}
    for name in NAMES[role].split():
        if name in plain and plain[name].kind in KINDS.get(role, (plain[name].kind,)):
            return plain[name]
    return None


def _head(raw: RawFiles, columns: Sequence[ColumnProfile]) -> str:
    lines = [
        "# Drafted by `llm4msr schema`: guesses with their reasons. Read every line, mend what is wrong, and",
        "# give it to `llm4msr prepare parquet --schema`. What each section says: docs/how-to/features.md.",
        f"# {_one_line(str(raw.path))}: {raw.rows:,} rows in {len(raw.files)} files, {len(columns)} columns.",
        f"name: {scalar(_plain_name(raw.path.stem))}",
    ]
    return "\n".join(lines)


def _columns(columns: Sequence[ColumnProfile], roles: dict[str, ColumnProfile]) -> list[str]:
    lines = ["columns:"]
    for role in ("user_id", "item_id", "scenario_id", "timestamp", "label"):
        guess = roles.get(role)
        if guess is None:
            lines.append(f"  {role}: {FILL}  # WARNING: no column looks like it")
            continue
        why = "by its name" if _by_name(role, [guess]) is not None else "the only one of its kind"
        lines.append(f"  {role}: {scalar(guess.name)}  # {why}; {guess.describe()}")
        if guess.nulls:
            lines.append(f"  # WARNING: {guess.nulls:,} rows have no {role}: prepare refuses them")
    time = roles.get("timestamp")
    return [*lines, *(_unit(time) if time is not None and time.kind == "int64" else [])]


def _unit(time: ColumnProfile) -> list[str]:
    """Lines on the unit of integers: the one in which the newest is a date of 1973 to 2100."""
    fits = {
        unit: [CLOCK_FROM <= end / per_second < CLOCK_TO for end in (time.low, time.high)]
        for unit, per_second in UNITS.items()
    }
    unit = next((name for name, (_, newest) in fits.items() if newest), None)
    if unit is None:
        return [
            f"# WARNING: {time.low} to {time.high} are times in no unit since 1970. If they are an order,",
            f"# write columns: {{order: {scalar(time.name)}}} in place of timestamp.",
        ]
    lines = [f"timestamp_unit: {unit}  # so the newest is a date between 1973 and 2100"]
    if not fits[unit][0]:
        lines.append(
            f"# WARNING: the oldest time, {time.low}, looks like another unit: mend or drop it"
        )
    return lines


def _scenarios(
    con: duckdb.DuckDBPyConnection, raw: RawFiles, column: ColumnProfile | None
) -> list[str]:
    lines = ["scenarios:  # say in words what each is: the descriptions may enter prompts"]
    values: list[Any] = [FILL]
    if column is not None:
        query = (
            f"SELECT DISTINCT x FROM {raw.sql({'x': column.name})} WHERE x IS NOT NULL ORDER BY x"
        )
        values = [value for (value,) in con.execute(query).fetchall()]
    for value in values:
        text = scalar(f"Scenario {value}")
        lines.append(f"  - {{scenario_id: {scalar(value)}, name: {text}, description: {text}}}")
    return lines


# ---------------------------------------------------------------- features


def _features_of_log(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    columns: Sequence[ColumnProfile],
    roles: dict[str, ColumnProfile],
    draft: Draft,
) -> list[str]:
    """Declares the other columns of the log; lines of the section labels."""
    label, labels = roles.get("label"), []
    for column in columns:
        if column in roles.values():
            continue
        action = FURTHER_LABELS.fullmatch(column.name.lower())
        if action is not None and column.is_binary and label is not None:
            name = re.sub(r"[^a-z0-9]+", "_", column.name.lower()).strip("_")
            labels.append(
                f"  {scalar(name)}: {scalar(column.name)}  # 0 and 1, named as an action; {column.describe()}"
            )
            continue
        if label is not None and not column.types and not column.element and not column.is_constant:
            told = label_auc(con, raw, column, label.name)
            if told >= LEAK:
                why = (
                    f"WARNING: tells {label.name} by itself (AUC {told:.2f}); a leak, unless it is known "
                    "before the event"
                )
                draft.ignore(column, why)
                continue
        _declare(con, raw, column, "log", draft, dated=True)
    return labels


def _table(
    con: duckdb.DuckDBPyConnection,
    name: str,
    path: Path,
    key: str,
    of_log: ColumnProfile | None,
    base: Path,
    draft: Draft,
) -> list[str]:
    """Lines of a table's section; its other columns become features."""
    raw = RawFiles.open(path)
    columns = profile_columns(con, raw)
    same = [one for one in columns if of_log is not None and one.name == of_log.name]
    guess = same[0] if same else _by_name(key, columns)
    used: dict[str, ColumnProfile | None] = {key: guess}
    rest = [one for one in columns if one is not guess]
    used["since"] = _by_name("since", rest)
    if name == "catalogue":
        used["title"], used["categories"] = _by_name("title", rest), _by_name("categories", rest)
    given = {role: one.name for role, one in used.items() if one is not None}
    lines = [f"{name}:", f"  path: {scalar(_relative(path, base))}  # {raw.rows:,} rows"]
    for role in (key, "title")[: 2 if name == "catalogue" else 1]:
        given.setdefault(role, FILL)
    for role, chosen in given.items():
        of_role = used[role]
        seen = "WARNING: no column looks like it" if of_role is None else of_role.describe()
        lines.append(f"  {role}: {scalar(chosen)}  # {seen}")
    if guess is not None and "since" not in given and guess.distinct < min(raw.rows, 100_000):
        lines.append(
            f"  # WARNING: {guess.name} repeats: name the column that says since when a row holds"
        )
    for column in columns:
        if column not in used.values():
            _declare(con, raw, column, name, draft, dated="since" in given)
    return lines


def _declare(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    column: ColumnProfile,
    source: str,
    draft: Draft,
    dated: bool,
) -> None:
    """Declares one column as a feature, or leaves it out with the reason."""
    if column.types:
        draft.ignore(column, f"WARNING: is {' and '.join(column.types)} in different files")
    elif column.is_constant:
        draft.ignore(column, "WARNING: constant")
    elif column.unusable:
        draft.ignore(
            column, f"WARNING: {column.unusable:,} rows with NaN, infinity or a null in a list"
        )
    elif column.element in ("int64", "bool", "string"):
        draft.add(column, source, {"kind": "ids"}, "lists")
    elif column.kind in ("bool", "string"):
        separator = separator_of(con, raw, column.name) if column.kind == "string" else None
        if separator is not None:
            draft.add(column, source, {"kind": "ids", "separator": separator}, "few parts in texts")
        elif column.distinct > max(column.rows / 2, FEW_TEXTS):
            draft.ignore(column, "almost every row has a text of its own: no feature")
        else:
            draft.add(column, source, {"kind": "id"}, "repeated values")
    elif column.kind == "int64" and _looks_like_id(column):
        draft.add(column, source, {"kind": "id"}, "integers, by name or for few different values")
    elif column.kind in ("int64", "float"):
        if dated:
            draft.add(column, source, {"kind": "number"}, "numbers")
        else:
            draft.ignore(
                column,
                "a number that holds for all times; if it is no statistic of the log, declare it as number "
                "with timeless: true",
            )
    else:
        draft.ignore(column, f"{column.kind} is no feature; lists of numbers may be weights of ids")


def _looks_like_id(column: ColumnProfile) -> bool:
    return column.distinct <= FEW_VALUES or column.name.lower().endswith("id")


# ---------------------------------------------------------------- YAML


def scalar(value: Any) -> str:
    """A value as YAML in one line; whatever is not plainly a word is quoted as in JSON."""
    if isinstance(value, bool | int):
        return str(value).lower()
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value)
    words = ("true", "false", "null", "none", "yes", "no", "on", "off", "y", "n")
    return value if plain and value.lower() not in words else json.dumps(value)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "log"


def _relative(path: Path, base: Path) -> str:
    absolute = path.absolute()
    inside = absolute.is_relative_to(base.absolute())
    return str(absolute.relative_to(base.absolute()) if inside else absolute)
