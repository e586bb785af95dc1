"""`llm4msr prepare parquet`: valid logs become the oracle's rows, broken ones are refused."""

from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from tests.fuzz import faults, oracle
from tests.fuzz.logs import Log, random_log, write_log
from tests.fuzz.verdicts import Broken, Ended, contents, run, untouched


def prepare(paths: dict[str, Path], out: Path) -> Ended:
    words = ["prepare", "parquet", "--raw", paths["raw"], "--schema", paths["schema"], "--out", out]
    return run(*map(str, words))


def valid_log(draw: Random, folder: Path) -> str:
    """Exit code 0 and the oracle's rows, or 2 where a split would be empty."""
    log = random_log(draw)
    paths = write_log(draw, log, folder / "in")
    with untouched(folder / "in"):
        ended = prepare(paths, folder / "out")
    wanted = oracle.dataset(log.rows, log.rule)
    if wanted is None:
        return refused(ended, folder, "an empty split")
    items = oracle.items(log.rows, log.catalogue)
    if log.catalogue is not None and not oracle.have_texts(items, log.rows):
        return refused(ended, folder, "a catalogue without a text of any item")
    if ended.code:
        raise Broken(f"a valid log is refused: {ended.message[:300]}")
    compare(folder / "out", wanted, items)
    return "prepared"


def broken_log(draw: Random, folder: Path) -> str:
    """Exit code 2, one message, nothing written, whatever is wrong."""
    log = random_log(draw)
    if draw.random() < 0.4:
        fault = draw.choice(faults.MEANINGS)
        fault(draw, log)
        paths = write_log(draw, log, folder / "in")
    else:
        written = draw.choice(faults.WRITTEN)
        paths = write_log(draw, log, folder / "in")
        written(draw, log, paths)
        fault = written  # type: ignore[assignment]
    with untouched(folder / "in"):
        return refused(prepare(paths, folder / "out"), folder, fault.__name__)


def flipped_log(draw: Random, folder: Path) -> str:
    """Some bytes of a file are others: refused, or prepared as a whole; never a traceback."""
    log = random_log(draw)
    paths = write_log(draw, log, folder / "in")
    files = sorted(f for f in (folder / "in").rglob("*") if f.is_file())
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 30])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))
    with untouched(folder / "in"):
        ended = prepare(paths, folder / "out")
    return refused(ended, folder, "flips") if ended.code else "prepared all the same"


def refused(ended: Ended, folder: Path, what: str) -> str:
    if ended.code == 0:
        raise Broken(f"not refused: {what}")
    left = sorted(path.name for path in folder.iterdir() if path.name != "in")
    if left:
        raise Broken(f"refused ({what}), but {left[0]} was left")
    return "refused"


def compare(out: Path, wanted: dict[str, list[oracle.Row]], items: list[oracle.Row]) -> None:
    for split, rows in wanted.items():
        found = read(out / split)
        if not oracle.same(found, rows):
            missing = next((row for row in rows if row not in found), None)
            beside = next((row for row in found if row not in rows), None)
            raise Broken(
                f"{split}: {len(found)} rows, not these {len(rows)}: {beside} for {missing}"[:500]
            )
        times = [row["timestamp"] for row in found]
        if times != sorted(times):
            raise Broken(f"{split} is not in order of time")
    beside = {path.name for path in out.iterdir()} - {*wanted, "items.parquet", "dataset.json"}
    if beside:
        raise Broken(f"{sorted(beside)[0]} was written as well")
    if read(out / "items.parquet") != items:
        raise Broken(f"items.parquet: {read(out / 'items.parquet')} instead of {items}"[:500])


def read(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def taken_output(draw: Random, folder: Path) -> str:
    """What lies where the dataset is to go is never changed."""
    log = random_log(draw)
    paths = write_log(draw, log, folder / "in")
    out = folder / "out"
    kind = draw.choice(["file", "full", "link", "below a file", "the input"])
    if kind == "file":
        out.write_text("mine")
    elif kind == "full":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "link":
        out.symlink_to(folder / "in")
    elif kind == "below a file":
        (folder / "file").write_text("mine")
        out = folder / "file" / "out"
    else:
        out = folder / "in"
    before = contents(folder)
    ended = prepare(paths, out)
    if ended.code == 0:
        raise Broken(f"written over {kind}")
    if contents(folder) != before:
        raise Broken(f"refused, but something was changed: {kind}")
    return "refused"


def prepare_case(draw: Random, folder: Path) -> str:
    """One of all kinds of logs."""
    chance = draw.random()
    if chance < 0.5:
        return f"valid: {valid_log(draw, folder)}"
    if chance < 0.8:
        return f"broken: {broken_log(draw, folder)}"
    if chance < 0.95:
        return f"flipped: {flipped_log(draw, folder)}"
    return f"taken: {taken_output(draw, folder)}"


__all__ = ["Log", "prepare_case"]
