"""No event meets knowledge that contains it: prompts as extracted, joined as training joins them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.store.reader import NO_CUTOFF, KnowledgeStore
from tests.helpers.knowledge_data import random_dataset, tiny_encoder
from tests.helpers.log_data import SCHEMA, prepare, random_log
from trainer.data.dataset import SPLITS, split_files
from trainer.data.loading.row_encoder import KnowledgeJoin
from trainer.data.sources.simulate import simulate

LEVELS = ("user", "scenario", "item")
KEYS = {"user": "user_id", "scenario": "scenario_id", "item": "item_id"}


def simulated(path: Path) -> Path:
    """Split by one cut for all users; a user's events are days apart."""
    simulate(path, users=60, items=80, scenarios=3, events=2_500, seed=3)
    return path


def per_user(path: Path) -> Path:
    """Split per user; one user's profile window reaches beyond another's first training event."""
    path.mkdir(parents=True)
    return random_dataset(path, users=40, seed=3)


SOURCES: dict[str, Callable[[Path], Path]] = {"global_time": simulated, "per_user_time": per_user}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model"))


def with_own_titles(data: Path) -> Path:
    """Gives every item a title that is no part of any other text."""
    file = data / "items.parquet"
    items = pq.read_table(file)
    titles = pa.array([f"<item {item}>" for item in items["item_id"].to_pylist()])
    pq.write_table(items.set_column(1, items.schema.field("title"), titles), file)
    about = json.loads((data / "dataset.json").read_text())
    about.pop("footers", None)  # of the file as it was
    (data / "dataset.json").write_text(json.dumps(about))
    return data


def prompts_of(data: Path, out: Path, model: Path) -> dict[str, KnowledgeStore]:
    options = {"model": str(model), "device": "cpu", "progress": False, "max_tokens": 512}
    extract(ExtractConfig(data=data, out=out, level="all", **options))
    return {level: KnowledgeStore.open(out / level) for level in LEVELS}


@pytest.fixture(scope="module", params=SOURCES)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> tuple[Path, dict[str, KnowledgeStore], Path]:
    folder = tmp_path_factory.mktemp(request.param)
    data = with_own_titles(SOURCES[request.param](folder / "data"))
    return data, prompts_of(data, folder / "knowledge", model), model


def read(data: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in split_files(data, split)])


def joined_prompts(table: pa.Table, store: KnowledgeStore, level: str) -> list[str | None]:
    """The prompt behind the vector that each event is joined with; None where none is eligible."""
    rows = KnowledgeJoin(store).rows(table[KEYS[level]], table["timestamp"].to_numpy())
    texts = [text["prompt"] for text in store.read_text(np.arange(len(store)))]
    return [texts[row] if row >= 0 else None for row in rows]


def test_no_own_item_and_nothing_later_in_the_joined_user_prompt(world) -> None:
    data, stores, _ = world
    split = {name: read(data, name).to_pylist() for name in SPLITS}
    happened: dict[tuple[int, int], int] = {}  # (user, item) -> the first time
    for rows in split.values():
        for row in rows:
            key = row["user_id"], row["item_id"]
            happened[key] = min(happened.get(key, row["timestamp"]), row["timestamp"])
    items: dict[int, list[int]] = {}
    for user, item in happened:
        items.setdefault(user, []).append(item)
    checked = 0
    for name in SPLITS[1:]:
        table = read(data, name)
        for row, prompt in zip(
            split[name], joined_prompts(table, stores["user"], "user"), strict=True
        ):
            if prompt is None:  # no profile event of this user
                continue
            user, time = row["user_id"], row["timestamp"]
            for item in items[user]:
                # An item that the user had before may be named, even if it comes again now or later.
                if happened[user, item] >= time:
                    assert f"<item {item}>" not in prompt
                    checked += item == row["item_id"]
            shown = {item for item in items[user] if f"<item {item}>" in prompt}
            assert all(happened[user, item] < time for item in shown)
    assert checked > 200  # events whose own item was new to the user


def test_every_later_event_of_a_profiled_user_is_joined(world) -> None:
    """The rule is not kept by joining nothing."""
    data, stores, _ = world
    known = set(stores["user"].keys().tolist())
    for name in SPLITS[1:]:
        table = read(data, name)
        for user, prompt in zip(
            table["user_id"].to_pylist(), joined_prompts(table, stores["user"], "user"), strict=True
        ):
            assert (prompt is not None) == (user in known)


def test_profile_events_join_nothing_that_they_are_part_of(world) -> None:
    data, stores, _ = world
    table = read(data, "profile")
    newest: dict[int, int] = {}
    for user, time in zip(
        table["user_id"].to_pylist(), table["timestamp"].to_pylist(), strict=True
    ):
        newest[user] = max(newest.get(user, 0), time)
    assert joined_prompts(table, stores["user"], "user") == [None] * len(table)
    store = stores["user"]
    assert dict(zip(store.keys().tolist(), store.cutoffs().tolist(), strict=True)) == newest
    facts = json.loads((data / "dataset.json").read_text())
    if facts["split"]["rule"] == "global_time":
        assert joined_prompts(table, stores["scenario"], "scenario") == [None] * len(table)
    # Items come from the catalogue alone, so their vectors have no date.
    assert set(stores["item"].cutoffs().tolist()) == {int(NO_CUTOFF)}


def test_no_title_in_a_scenario_prompt_and_no_other_in_an_item_prompt(world) -> None:
    _, stores, _ = world
    for text in stores["scenario"].read_text(np.arange(len(stores["scenario"]))):
        assert "<item" not in text["prompt"]
    store = stores["item"]
    for key, text in zip(store.keys(), store.read_text(np.arange(len(store))), strict=True):
        assert f"<item {key}>" in text["prompt"]
        assert text["prompt"].count("<item") == 1


def scramble(data: Path) -> None:
    """Turns every label of train, valid and test and deals their items to other events."""
    rng = np.random.default_rng(0)
    for name in SPLITS[1:]:
        for file in split_files(data, name):
            table = pq.read_table(file)
            for column, values in (
                ("label", 1 - table["label"].to_numpy()),
                ("item_id", rng.permutation(table["item_id"].to_numpy())),
                ("scenario_id", rng.permutation(np.array(table["scenario_id"].to_pylist()))),
            ):
                place = table.schema.get_field_index(column)
                field = table.schema.field(column)
                table = table.set_column(place, field, pa.array(values.tolist(), field.type))
            pq.write_table(table, file)


def test_prompts_do_not_depend_on_any_later_event(world, tmp_path: Path) -> None:
    data, stores, model = world
    shutil.copytree(data, tmp_path / "data")
    scramble(tmp_path / "data")
    for name in SPLITS[1:]:
        assert not read(data, name).equals(read(tmp_path / "data", name))
    again = prompts_of(tmp_path / "data", tmp_path / "knowledge", model)
    for level, store in stores.items():
        rows = np.arange(len(store))
        assert again[level].keys().tolist() == store.keys().tolist()
        assert again[level].cutoffs().tolist() == store.cutoffs().tolist()
        assert again[level].read_text(rows) == store.read_text(rows)
        assert again[level].fingerprint == store.fingerprint  # vectors too, byte for byte


def test_prompts_do_depend_on_the_profile_window(world, tmp_path: Path) -> None:
    """The test above can fail: an altered profile event alters the prompts."""
    data, stores, model = world
    shutil.copytree(data, tmp_path / "data")
    file = split_files(tmp_path / "data", "profile")[0]
    table = pq.read_table(file)
    turned = pa.array(1 - table["label"].to_numpy(), pa.int8())
    pq.write_table(table.set_column(4, table.schema.field("label"), turned), file)
    again = prompts_of(tmp_path / "data", tmp_path / "knowledge", model)
    for level in ("user", "scenario"):
        rows = np.arange(len(stores[level]))
        assert again[level].read_text(rows) != stores[level].read_text(rows)


@pytest.mark.parametrize("rule", ["global_time", "per_user_time"])
def test_a_log_with_another_future_gives_the_same_prompts(
    tmp_path: Path, model: Path, rule: str
) -> None:
    """From the raw log on: what happens after the profile window changes no prompt."""
    schema = SCHEMA | {"split": {"rule": rule}, "catalogue": {"path": "items.parquet"}}
    titles = {"item_id": list(range(60)), "title": [f"<item {item}>" for item in range(60)]}
    (tmp_path / "one" / "raw").mkdir(parents=True)
    pq.write_table(pa.table(titles), tmp_path / "one" / "raw" / "items.parquet")
    one = prepare(tmp_path / "one", random_log(), schema)
    past = read(one, "profile").drop_columns("history")
    later = pa.concat_tables([read(one, split) for split in SPLITS[1:]]).drop_columns("history")
    rng = np.random.default_rng(1)
    changed = later.to_pydict()
    changed["label"] = [1 - label for label in changed["label"]]
    for column in ("item_id", "scenario_id"):
        changed[column] = rng.permutation(changed[column]).tolist()
    log = {name: past[name].to_pylist() + changed[name] for name in past.column_names}
    (tmp_path / "two").mkdir()
    shutil.copytree(tmp_path / "one" / "raw", tmp_path / "two" / "raw")
    two = prepare(tmp_path / "two", log, schema)
    assert not read(one, "test")["label"].equals(read(two, "test")["label"])
    found = [prompts_of(data, data.parent / "knowledge", model) for data in (one, two)]
    for level in LEVELS:
        texts = [store[level].read_text(np.arange(len(store[level]))) for store in found]
        assert texts[0] == texts[1]
        assert found[0][level].cutoffs().tolist() == found[1][level].cutoffs().tolist()
