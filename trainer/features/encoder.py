"""The one place where raw columns become what the model reads: in training, scoring and serving; no torch.

RUN/features.json    columns, options, moments, boundaries, rows of every feature
RUN/ids/NAME.parquet the vocabulary of feature NAME, in row order
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embeddings.ids import IdMap, Vocabulary
from llm_knowledge.errors import InputError
from llm_knowledge.files import write_json
from trainer.data.checks import find_problem
from trainer.features.encoding import Encoding, UnusableError, options_of
from trainer.features.ragged import Ragged
from trainer.features.resolve import Feature
from trainer.features.steps import ITEM, encode_steps

FILE = "features.json"
FORMAT_VERSION = 1
IDS = "feature_ids"
NUMBERS = "feature_numbers"
TUPLES = ("columns", "boundaries", "fields")  # of an encoding, lists in features.json


class FeatureEncoder:
    """Maps rows of raw columns to rows of tables and numbers; each row by itself.

    Args:
        encodings: One per feature, fitted.
    """

    def __init__(self, encodings: Sequence[Encoding]) -> None:
        self.encodings = list(encodings)
        self.single = [
            encoding
            for encoding in encodings
            if not encoding.is_number and encoding.kind in ("id", "number", "cross")
        ]
        self.lists = [encoding for encoding in encodings if encoding.kind == "ids"]
        self.numbers = [encoding for encoding in encodings if encoding.is_number]
        self.sequences = [encoding for encoding in encodings if encoding.kind == "sequence"]

    @property
    def columns(self) -> list[str]:
        """Columns that `encode` reads."""
        named = [
            column
            for encoding in self.encodings
            for column in (*encoding.columns, encoding.weights)
        ]
        return list(dict.fromkeys(column for column in named if column is not None))

    @property
    def by_table(self) -> dict[str, Encoding]:
        """Encodings of the features that have a table, by its name."""
        return {encoding.table_name: encoding for encoding in self.encodings if encoding.has_table}

    @property
    def item_steps(self) -> list[str]:
        """Columns of sequences whose steps read the item table."""
        return [
            column
            for encoding in self.sequences
            for field, column in zip(encoding.fields, encoding.columns, strict=True)
            if field == ITEM
        ]

    def encode(
        self, table: pa.Table, source: Path | None = None, items: IdMap | None = None
    ) -> dict[str, np.ndarray | Ragged]:
        """Encodes rows.

        Args:
            table: n rows with `columns`; null where a row has no value.
            source: File that they are from, for messages.
            items: Ids of the run's item table; needed where sequences have the field item.

        Returns:
            "feature_ids": rows of the tables, int64 [n, single-valued features], -1 where there is no
            value; "feature_numbers": float32 [n, 2 * numbers], each with 1 behind it where it is
            missing; the name of each list's table to its rows, ragged [n]; and each column of a sequence
            to the rows of its steps, see `encode_steps`.

        Raises:
            InputError: A number is not finite, or a list or a sequence is not as it should be; names file,
                column and row.
        """
        try:
            ids = [encoding.single(table) for encoding in self.single]
            numbers = [encoding.numbers(table) for encoding in self.numbers]
            lists = {encoding.table_name: encoding.ragged(table) for encoding in self.lists}
            by_name = {encoding.name: encoding for encoding in self.encodings}
            for sequence in self.sequences:
                lists |= encode_steps(sequence, table, items, by_name)
        except UnusableError as error:
            column = str(error)
            problem = find_problem(source, column) if source is not None else None
            raise problem or InputError(
                f"{source or 'a row'}: column {column!r} has a number that is not finite, a null in a list, "
                "a gap below 0, or not as many values in a row as what goes with it; give a number, or null "
                "where there is none"
            ) from None
        shape = (len(table), 0)
        return {
            IDS: np.stack(ids, axis=1) if ids else np.zeros(shape, dtype=np.int64),
            NUMBERS: np.concatenate(numbers, axis=1) if numbers else np.zeros(shape, np.float32),
            **lists,
        }

    # ------------------------------------------------------------ on disk

    def save(self, folder: Path) -> None:
        """Writes vocabularies, then features.json by rename: where it is, the encoder is whole."""
        (folder / "ids").mkdir(exist_ok=True)
        for encoding in self.encodings:
            if encoding.vocabulary is not None:
                encoding.vocabulary.save(folder / "ids" / f"{encoding.name}.parquet")
        entries = {encoding.name: _entry(encoding) for encoding in self.encodings}
        content = {"format_version": FORMAT_VERSION, "features": entries}
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> FeatureEncoder:
        """Reads what `save` wrote.

        Raises:
            InputError: A file is missing or damaged.
        """
        file = folder / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{file}: format_version is {version}, this program reads {FORMAT_VERSION}"
                )
            return cls(
                [_encoding(folder, name, entry) for name, entry in content["features"].items()]
            )
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            raise InputError(
                f"{file}: the features' encoder is missing or damaged ({error}); copy the run again, or "
                "train a new one"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Identifies everything that values are transformed with, vocabularies included."""
        digest = hashlib.sha256()
        for encoding in self.encodings:
            digest.update(json.dumps([encoding.name, _entry(encoding)], sort_keys=True).encode())
            if encoding.vocabulary is not None:
                for buffer in pa.concat_arrays([encoding.vocabulary.keys]).buffers()[1:]:
                    digest.update(buffer)
        return digest.hexdigest()[:32]

    def check(self, features: Sequence[Feature], where: Path) -> None:
        """Checks that the encoder is that of these features.

        Raises:
            InputError: One is missing, or encoded otherwise.
        """
        have = {encoding.name: encoding for encoding in self.encodings}
        for name in {**have, **{feature.name: feature for feature in features}}:
            configured = next((feature for feature in features if feature.name == name), None)
            if configured is None or name not in have:
                raise InputError(
                    f"features.use: {name} is {'not ' if configured is None else ''}configured, the encoder "
                    f"in {where / FILE} has features {', '.join(have) or 'none'}; configure the same, or "
                    "begin a new run"
                )
            before, now = have[name].options, options_of(configured)
            if (before, have[name].columns) != (now, configured.columns):
                raise InputError(
                    f"features.use.{name}: is encoded with {before} of {have[name].columns} in "
                    f"{where / FILE}, configured are {now} of {configured.columns}; configure the same, or "
                    "begin a new run"
                )


def _entry(encoding: Encoding) -> dict[str, Any]:
    """What features.json says of a feature."""
    fields = dataclasses.fields(Encoding)
    entry = {field.name: getattr(encoding, field.name) for field in fields}
    del entry["name"], entry["vocabulary"]
    if not entry["fields"]:  # as before there were sequences
        del entry["fields"]
    lists = {name: list(entry[name]) for name in TUPLES if name in entry}
    return entry | lists | {"vocabulary": encoding.vocabulary is not None}


def _encoding(folder: Path, name: str, entry: dict[str, Any]) -> Encoding:
    tuples = {part: tuple(entry[part]) for part in TUPLES if part in entry}
    path = folder / "ids" / f"{name}.parquet"
    vocabulary = Vocabulary.load(path) if entry["vocabulary"] else None
    return Encoding(name=name, **(entry | tuples | {"vocabulary": vocabulary}))
