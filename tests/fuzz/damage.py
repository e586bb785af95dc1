"""Folders that somebody else wrote, or that were damaged: bytes, names, types and kinds of files."""

import functools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.helpers.paths import ROOT


@functools.cache
def archive() -> list[tuple[str, bytes]]:
    """Every file of the stored example: a dataset, three stores, two runs with their checkpoints."""
    with tarfile.open(ROOT / "tests/stored/v0.1.tar.xz") as stored:
        members = [member for member in stored.getmembers() if member.isfile()]
        return [(m.name, stored.extractfile(m).read()) for m in members]  # type: ignore[union-attr]


def unpack(folder: Path) -> None:
    """Writes the stored example; paths in it are relative to `folder`."""
    for name, data in archive():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def damage(draw: Random, folder: Path) -> str:
    """Damages one to three files below a folder; says how."""
    said = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
        if not files:
            break
        file = draw.choice(files)
        ways = list(ANY)
        if file.suffix in (".json", ".jsonl"):
            ways += [json_value] * 12
        elif file.suffix == ".yaml":
            ways += [yaml_value] * 12
        elif file.suffix == ".parquet":
            ways += [parquet_column] * 8
        way = draw.choice(ways)
        way(draw, file)
        said.append(f"{way.__name__} of {file.relative_to(folder)}")
    return ", ".join(said)


LINKS = (
    "nowhere",
    "",
    "..",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/etc/hostname",
)  # "": itself


# ---------------------------------------------------------------- any file


def flip(draw: Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 50]) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))


def flip_in_the_tail(draw: Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[-draw.randrange(1, min(len(data), 600) + 1)] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))


def cut(draw: Random, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data) + 1)])


def zeros(draw: Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data) + 1)
    length = min(draw.choice([8, 100, 4096]), len(data) - start)
    data[start : start + length] = bytes(length)
    file.write_bytes(bytes(data))


def empty(draw: Random, file: Path) -> None:
    file.write_bytes(b"")


def longer(draw: Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + draw.choice([b"\n", b"\0" * 9, b"x" * 1000, b"{}"]))


def lost(draw: Random, file: Path) -> None:
    file.unlink()


def a_folder(draw: Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(draw: Random, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_link(draw: Random, file: Path) -> None:
    target = draw.choice(LINKS)
    file.unlink()
    file.symlink_to(target or file.name)


def renamed(draw: Random, file: Path) -> None:
    name = draw.choice(
        [
            f".{file.name}",
            f"{file.name}.bak",
            "é",
            "a b",
            "part-99999.parquet",
            "\n",
            "-x",
            "x" * 200,
        ]
    )
    file.rename(file.with_name(name))


def one_more(draw: Random, file: Path) -> None:
    """Something beside the file that has no business there."""
    name = draw.choice(
        [
            "part-00001.parquet",
            "part-00000.parquet.tmp",
            ".hidden",
            "x.json",
            "step-00000099",
            "step-x",
            "é\u202e",
            "a'b",
            "[a]",
            "manifest.json~",
        ]
    )
    beside = file.with_name(name)
    if draw.random() < 0.3 and not beside.exists():
        beside.mkdir()
    elif not beside.is_dir():
        beside.write_bytes(draw.choice([b"", b"PAR1", b"{", file.read_bytes()]))


def of_another(draw: Random, file: Path) -> None:
    """The bytes of another file of the example."""
    file.write_bytes(draw.choice(archive())[1])


def of_the_same_name(draw: Random, file: Path) -> None:
    """The bytes of a file of the same name elsewhere: of another store, split or run."""
    same = [data for name, data in archive() if Path(name).name == file.name]
    file.write_bytes(draw.choice(same or [b""]))


ANY: list[Callable[[Random, Path], None]] = [
    flip, flip, flip, flip_in_the_tail, cut, zeros, empty, longer, lost, lost, a_folder, a_pipe, a_link,
    renamed, one_more, of_another, of_the_same_name, of_the_same_name,
]  # fmt: skip


# ---------------------------------------------------------------- values of text files

ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 2**62, 2**63, 10**30, -(10**30), 1.5, float("nan"), float("inf"), "", "x", "é",
    "\u0000", "../..", "/", "/dev/null", "a" * 300, "1", [], [1], ["x"], [[]], {}, {"x": 1}, {"": None},
    "\u202e", "user", "runs", "data", "float16",
]  # fmt: skip


def odd_value(draw: Random, content: Any) -> Any:
    """Changes one value, or one name, somewhere in a nested structure."""
    if isinstance(content, dict) and content and draw.random() < 0.85:
        content = dict(content)
        name = draw.choice(list(content))
        chance = draw.random()
        if chance < 0.15:
            del content[name]
        elif chance < 0.25:
            content[draw.choice(["x", "", "name", "é"])] = draw.choice(ODD)
        else:
            content[name] = odd_value(draw, content[name])
        return content
    if isinstance(content, list) and content and draw.random() < 0.7:
        content = list(content)
        place = draw.randrange(len(content))
        if draw.random() < 0.2:
            content.insert(place, content[place])
        else:
            content[place] = odd_value(draw, content[place])
        return content
    if isinstance(content, int | float) and draw.random() < 0.4:
        return content + draw.choice([1, -1, 0.5, 1000])
    return draw.choice(ODD)


def json_value(draw: Random, file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else []
    try:
        if lines:
            number = draw.randrange(len(lines))
            lines[number] = json.dumps(odd_value(draw, json.loads(lines[number])))
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            content = odd_value(draw, json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(content), encoding="utf-8")
    except (ValueError, RecursionError):  # damaged before
        file.write_text("[" * 5000)


def yaml_value(draw: Random, file: Path) -> None:
    try:
        content = odd_value(draw, yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = "[" * 5000
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    file.write_text(text, encoding="utf-8")


def parquet_column(draw: Random, file: Path) -> None:
    """A column that is missing, of another type, with nulls, out of order, or cut."""
    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
    except (pa.ArrowException, OSError):
        return
    if not table.column_names:
        return
    name = draw.choice(table.column_names)
    place = table.column_names.index(name)
    chance = draw.random()
    if chance < 0.2:
        table = table.drop_columns(name)
    elif chance < 0.4:
        other = draw.choice([[1.5], ["x"], [None], [True], [[1]], [b"x"], [2**62], [-1]])
        table = table.set_column(place, name, pa.array(other * len(table)))
    elif chance < 0.55:
        values = [None if draw.random() < 0.1 else value for value in table[name].to_pylist()]
        field = table.schema.field(name).with_nullable(True)
        table = table.set_column(place, field, pa.array(values, field.type))
    elif chance < 0.7:
        table = table.take(pa.array(draw.sample(range(len(table)), len(table)), pa.int64()))
    elif chance < 0.8:
        table = table.slice(0, draw.randrange(len(table) + 1))
    elif chance < 0.9:
        table = pa.concat_tables([table, table.slice(0, 1)])
    else:
        table = table.rename_columns([c.upper() if c == name else c for c in table.column_names])
    pq.write_table(table, file)
