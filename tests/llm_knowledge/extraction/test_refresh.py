import io
import json
import multiprocessing
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from llm_knowledge.extraction import refresh as module
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.locks import directory_lock
from llm_knowledge.store import writer
from llm_knowledge.store.compress import compress
from llm_knowledge.store.inspect import inspect_store
from llm_knowledge.store.reader import KnowledgeStore, verify
from llm_knowledge.store.writer import write_store
from tests.helpers.knowledge_data import manifest, random_dataset, tiny_encoder

NEW_TIME = 2_000_000


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


def full(data, out, bert, **update):
    common = {"level": "user", "model": str(bert), "progress": False, "device": "cpu", **update}
    return extract(ExtractConfig(data=data, out=out, **common))


def go_on(data, users, drop=()):
    """Append an event of item 7 for each of ``users``, new ones or old; leave out all of ``drop``."""
    file = data / "profile" / "part-00000.parquet"
    table = pq.read_table(file)
    string = pa.types.is_string(table.schema.field("user_id").type)
    name = (lambda i: f"key-{i:03d}") if string else int
    more = [
        {
            "user_id": name(user),
            "item_id": name(7),
            "scenario_id": "food",
            "timestamp": NEW_TIME,
            "label": 1,
            "history": [],
        }
        for user in users
    ]
    rows = [row for row in table.to_pylist() if row["user_id"] not in {name(user) for user in drop}]
    pq.write_table(pa.Table.from_pylist(rows + more, table.schema), file)


def read(path):
    store = KnowledgeStore.open(path)
    rows = len(store)
    return store.keys(), store.cutoffs(), store.read_text(range(rows)), store.read_vectors(0, rows)


def same(one, two):
    a, b = read(one), read(two)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert a[2] == b[2]
    x, y = a[3].astype(np.float64), b[3].astype(np.float64)
    assert ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min() > 1 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_equals_a_full_extraction(bert, tmp_path, id_type, dtype, monkeypatch):
    data = random_dataset(tmp_path / "data", users=150, id_type=id_type)
    old = full(data, tmp_path / "old", bert, store_dtype=dtype, per_scenario=3, total=5)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    go_on(data, [3, 77, 200, 201], drop=[5, 6])
    encoded, prepare = [], Encoder._prepare
    monkeypatch.setattr(
        Encoder, "_prepare", lambda self, texts: encoded.extend(texts) or prepare(self, texts)
    )
    done = refresh(old, data, tmp_path / "new", model=str(bert), device="cpu")
    assert (done.kept, done.changed, done.added, done.removed, done.gone) == (146, 2, 2, 0, 2)
    assert len(encoded) == 4
    whole = full(data, tmp_path / "whole", bert, store_dtype=dtype, per_scenario=3, total=5)
    same(tmp_path / "new", whole)
    verify(tmp_path / "new")
    one, two = (KnowledgeStore.open(path).manifest for path in (tmp_path / "new", whole))
    assert one.parents == [KnowledgeStore.open(old).fingerprint]
    assert one.input_fingerprint == two.input_fingerprint
    assert [part.rows for part in one.parts] == [part.rows for part in two.parts]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


def test_nothing_changed_gives_the_same_bytes(bert, tmp_path, monkeypatch):
    data = random_dataset(tmp_path / "data", users=150)
    old = full(data, tmp_path / "old", bert)
    monkeypatch.setattr(module, "WAITING_ROWS", 70)  # several groups of parts
    done = refresh(old, data, tmp_path / "new", model=str(bert), device="cpu")
    assert (done.kept, done.changed) == (150, 0)
    for one, two in zip(read(old), read(tmp_path / "new"), strict=True):
        np.testing.assert_array_equal(one, two)
    again = refresh(tmp_path / "new", data, tmp_path / "third", model=str(bert), device="cpu")
    assert again.kept == 150


def test_who_asks_to_be_forgotten_is_gone_everywhere(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=150)
    old = full(data, tmp_path / "old", bert, chunk=64)
    compress(old, tmp_path / "small", 8)
    go_on(data, [9])
    forget = [4, *range(64, 128)]  # with a whole part
    child = (tmp_path / "small", tmp_path / "small-new")
    done = refresh(old, data, tmp_path / "new", forget, [child], model=str(bert), device="cpu")
    assert (done.kept, done.changed, done.removed) == (84, 1, 65)
    for path in (tmp_path / "new", tmp_path / "small-new"):
        verify(path)
        assert KnowledgeStore.open(path).keys().tolist() == [
            u for u in range(150) if u not in forget
        ]
    small, successor = KnowledgeStore.open(tmp_path / "small"), KnowledgeStore.open(child[1])
    assert successor.manifest.parents == [KnowledgeStore.open(tmp_path / "new").fingerprint]
    keep = [u for u in range(150) if u not in (*forget, 9)]
    a = small.read_vectors(0, 150)[small.row_of(keep)]
    b = successor.read_vectors(0, 85)[successor.row_of(keep)]
    np.testing.assert_allclose(a, b, atol=1e-4)  # the projection is the old one
    assert np.abs(small.read_vectors(9, 10) - successor.read_vectors(8, 9)).max() > 1e-3


def test_what_is_refused_leaves_nothing(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=30)
    old = full(data, tmp_path / "old", bert)
    common = {"model": str(bert), "device": "cpu"}
    with pytest.raises(InputError, match=r"key 999 is neither in .*nothing was written"):
        refresh(old, data, tmp_path / "new", [999], **common)
    with pytest.raises(InputError, match=r"keys of .* are integers"):
        refresh(old, data, tmp_path / "new", ["anna"], **common)
    with pytest.raises(InputError, match="no row is left"):
        refresh(old, data, tmp_path / "new", range(30), **common)
    other = tiny_encoder(tmp_path / "other")
    (other / "model.safetensors").write_bytes(
        (other / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0"
    )
    with pytest.raises(InputError, match=r"model: .*extract anew"):
        refresh(old, data, tmp_path / "new", model=str(other), device="cpu")
    with pytest.raises(InputError, match="is no child"):
        refresh(old, data, tmp_path / "new", children=[(old, tmp_path / "c")], **common)
    compress(old, tmp_path / "small", 4)
    with pytest.raises(InputError, match="derived from another store"):
        refresh(tmp_path / "small", data, tmp_path / "new", **common)
    about = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(about | {"complete": False}))
    with pytest.raises(InputError, match="incomplete"):
        refresh(old, data, tmp_path / "new", **common)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "old", "other", "small"]


def test_an_interrupted_refresh_leaves_the_old_store(bert, tmp_path, monkeypatch):
    data = random_dataset(tmp_path / "data", users=150)
    old = full(data, tmp_path / "old", bert)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    go_on(data, [1])

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "_encode_ids", stop)
    with pytest.raises(KeyboardInterrupt):
        refresh(old, data, tmp_path / "new", model=str(bert), device="cpu")
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "old"]


def refresh_that_dies(*arguments, waiting, **options):
    """A refresh in batches of `waiting` prompts whose process ends before the fifth part."""
    count, write = [], writer.write_part
    module.WAITING_PROMPTS = waiting

    def dies(*args):
        if len(count) == 4:
            os._exit(9)
        count.append(1)
        return write(*args)

    writer.write_part = dies
    refresh(*arguments, **options)


@pytest.mark.slow
def test_a_killed_refresh_goes_on_where_it_was(bert, tmp_path, monkeypatch):
    data = random_dataset(tmp_path / "data", users=150)
    old = full(data, tmp_path / "old", bert, chunk=20)
    go_on(data, range(0, 150, 3))
    monkeypatch.setattr(module, "WAITING_PROMPTS", 5)
    options = {"model": str(bert), "device": "cpu", "chunk": 20}
    # Not a fork: earlier tests have left threads (Spark's, Arrow's) that a fork does not survive.
    child = multiprocessing.get_context("spawn").Process(
        target=refresh_that_dies,
        args=(old, data, tmp_path / "new"),
        kwargs={**options, "waiting": 5},
    )
    child.start()
    child.join(120)
    assert child.exitcode == 9
    partial = tmp_path / ".new.partial"
    assert len(list(partial.glob("part-*.parquet"))) == 4
    with directory_lock(partial), pytest.raises(InputError, match="another run is writing here"):
        refresh(old, data, tmp_path / "new", **options)
    (partial / "part-00001.parquet").write_bytes(b"PAR1")  # as a crash of the machine leaves it
    encoded, prepare = [], Encoder._prepare
    monkeypatch.setattr(
        Encoder, "_prepare", lambda self, texts: encoded.extend(texts) or prepare(self, texts)
    )
    done = refresh(old, data, tmp_path / "new", **options)
    assert (done.kept, done.changed) == (100, 50)
    assert len(encoded) == 50 - 7 - 6 - 7  # those of three parts were there
    same(tmp_path / "new", full(data, tmp_path / "whole", bert, chunk=20))
    names = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert names == ["manifest.json", *(f"part-{index:05d}.parquet" for index in range(8))]
    assert not partial.exists()


def test_items_and_scenarios(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=30)
    for level in ("item", "scenario"):
        old = full(data, tmp_path / level, bert, level=level)
        done = refresh(old, data, tmp_path / f"{level}-new", model=str(bert), device="cpu")
        assert (done.kept, done.changed) == (len(KnowledgeStore.open(old)), 0)
        same(old, tmp_path / f"{level}-new")
    about = json.loads((data / "dataset.json").read_text())
    about["scenarios"][0]["description"] = "Something else."
    (data / "dataset.json").write_text(json.dumps(about))
    done = refresh(tmp_path / "scenario", data, tmp_path / "third", model=str(bert), device="cpu")
    assert done.changed >= 1
    same(full(data, tmp_path / "whole", bert, level="scenario"), tmp_path / "third")


@pytest.mark.slow
def test_one_percent_costs_little(tmp_path):
    data = random_dataset(tmp_path / "data", users=1000)
    begun = time.perf_counter()
    old = full(data, tmp_path / "old", None, model=None)
    whole = time.perf_counter() - begun
    go_on(data, range(0, 1000, 100))
    begun = time.perf_counter()
    done = refresh(old, data, tmp_path / "new", device="cpu")
    part = time.perf_counter() - begun
    print(f"full {whole:.1f} s, refresh of 1 % {part:.2f} s")
    assert done.changed == 10
    assert part < 0.25 * whole


def test_a_store_that_does_not_say_how_long_its_prompts_are_is_extracted_once_more(bert, tmp_path):
    data = random_dataset(tmp_path / "data", users=10)
    vectors = np.ones((10, 8), dtype=np.float32)
    write_store(tmp_path / "old", manifest(profile=None), list(range(10)), vectors)
    with pytest.raises(InputError, match=r"how many items a prompt may have.*extract once more"):
        refresh(tmp_path / "old", data, tmp_path / "new", model=str(bert), device="cpu")
    assert not (tmp_path / "new").exists()


def test_cutoffs_of_a_log_without_a_clock_are_places_not_dates(bert, tmp_path):
    data = random_dataset(tmp_path, users=3)
    about = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(about | {"timestamps": "order"}))
    store = full(data, tmp_path / "store", bert)
    refresh(store, data, tmp_path / "again", model=str(bert), device="cpu")
    for path in (store, tmp_path / "again"):
        shown = io.StringIO()
        inspect_store(path, out=shown)
        newest = KnowledgeStore.open(path).cutoffs()[0]
        assert f"cut-off place {newest} in the user's order" in shown.getvalue()
        assert "1970" not in shown.getvalue()
