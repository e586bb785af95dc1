"""Stores of several dates side by side: each event joins the newest one that is older than itself."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.main import main
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.profiles.dataset import Dataset
from llm_knowledge.store.dated import DatedStores, cutoff_times, store_paths
from llm_knowledge.store.manifest import Cutoff
from llm_knowledge.store.reader import KnowledgeStore
from llm_knowledge.store.writer import write_store
from tests.helpers.knowledge_data import manifest, random_dataset, tiny_encoder
from tests.helpers.training_data import make_config, make_inputs
from trainer.data.loading.row_encoder import KnowledgeJoin
from trainer.run.inputs import open_stores


def dated_store(path: Path, cutoff: int, keys: list, seed: int = 0, **update) -> Path:
    vectors = np.random.default_rng([seed, abs(cutoff)]).normal(size=(len(keys), 8))
    kind = "int64" if isinstance(keys[0], int) else "string"
    about = manifest(cutoff=Cutoff(kind="global", value=cutoff), key_type=kind, **update)
    write_store(path, about, keys, vectors, None, None, [cutoff] * len(keys), rows_per_part=5)
    return path


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("seed", range(4))
def test_every_event_joins_the_newest_store_before_it(
    tmp_path: Path, id_type: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    name = (lambda i: int(i)) if id_type == "int64" else (lambda i: f"ü{i}")
    times = sorted({int(t) for t in rng.integers(0, 40, 5)})
    have = {t: [name(i) for i in np.flatnonzero(rng.random(30) < 0.5)] for t in times}
    for time, keys in have.items():
        dated_store(tmp_path / "dated" / f"cutoff-{time}", time, keys, seed)
    dated = DatedStores.open(tmp_path / "dated")
    assert [store.manifest.cutoff.value for store in dated.stores] == times
    users = [name(i) for i in rng.integers(0, 33, 2_000)]
    events = rng.integers(-2, 43, 2_000)  # every cut-off is also the time of some events
    assert set(times) <= set(events.tolist())
    rows = KnowledgeJoin(*dated.stores).rows(pa.chunked_array([users[:700], users[700:]]), events)
    everything = dated.read_vectors(0, len(dated))
    vectors = {
        (time, key): store.read_vectors(row, row + 1)[0]
        for time, store in zip(times, dated.stores, strict=True)
        for row, key in enumerate(store.keys().tolist())
    }
    for user, event, row in zip(users, events.tolist(), rows.tolist(), strict=True):
        eligible = [time for time in times if time < event and user in have[time]]
        if not eligible:
            assert row == -1
        else:
            np.testing.assert_array_equal(everything[row], vectors[max(eligible), user])
    # A rank reads only its own rows, also across stores.
    for low, high in rng.integers(0, len(dated) + 1, (20, 2)):
        np.testing.assert_array_equal(dated.read_vectors(low, high), everything[low:high])


def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    dated_store(tmp_path / "d" / "one", 10, [1, 2])
    other = manifest().model.model_copy(update={"name": "another"})
    cases: list[tuple[str, dict, str]] = [
        ("same", {"cutoff": 10}, "same cut-off 10"),
        ("model", {"cutoff": 20, "model": other}, "cannot stand beside .*'another'"),
        (
            "control",
            {"cutoff": 20, "note": "shuffled control, seed 0"},
            "note: '' there, 'shuffled",
        ),
    ]
    for name, about, message in cases:
        about = dict(about)
        dated_store(tmp_path / "d" / name, about.pop("cutoff"), [1, 2], **about)
        with pytest.raises(InputError, match=message):
            DatedStores.open(tmp_path / "d")
        shutil.rmtree(tmp_path / "d" / name)
    write_store(tmp_path / "d" / "undated", manifest(), [1, 2], np.ones((2, 8)))
    with pytest.raises(InputError, match=r"undated: has no date \(its cut-off is per_key\)"):
        DatedStores.open(tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds none, make one"):
        store_paths(tmp_path / "empty")


def test_compressed_and_shuffled_dates_share_one_space(tmp_path: Path, capsys) -> None:
    for time in (10, 20, 30):
        dated_store(tmp_path / "d" / f"cutoff-{time}", time, list(range(12 + time)))
    assert main(f"knowledge compress {tmp_path}/d --out {tmp_path}/small --dim 4".split()) == 0
    assert main(f"knowledge shuffle {tmp_path}/d --out {tmp_path}/control".split()) == 0
    assert main(f"knowledge verify {tmp_path}/d {tmp_path}/small {tmp_path}/control".split()) == 0
    small = DatedStores.open(tmp_path / "small")
    assert (len(small), small.dim) == (len(DatedStores.open(tmp_path / "d")), 4)
    assert len({s.manifest.compression.projection for s in small.stores}) == 1
    # A date that was compressed alone is of another space.
    shutil.rmtree(tmp_path / "small" / "cutoff-30")
    words = f"knowledge compress {tmp_path}/d/cutoff-30 --out {tmp_path}/small/cutoff-30 --dim 4"
    assert main(words.split()) == 0
    with pytest.raises(InputError, match="different projections"):
        DatedStores.open(tmp_path / "small")
    # The projection is what later dates are compressed with: verify looks at it too.
    file = tmp_path / "small" / "cutoff-10" / "projection.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert main(f"knowledge verify {tmp_path}/small/cutoff-10".split()) == 2
    assert "projection.safetensors: its bytes changed" in capsys.readouterr().err
    file.unlink()
    assert main(f"knowledge verify {tmp_path}/small/cutoff-10".split()) == 2


def test_cutoffs_as_words(tmp_path: Path) -> None:
    data = Dataset.open(random_dataset(tmp_path))
    times = pq.read_table(data.path / "train")["timestamp"].to_pylist()
    days = cutoff_times(["day"], data)
    assert days[0] < min(times)
    assert days[-1] >= max(times)
    assert all((day + 1) % 86_400 == 0 for day in days)
    assert cutoff_times(["20", "1970-01-02", "20"], data) == [20, 86_399]
    with pytest.raises(InputError, match="'soon': want seconds"):
        cutoff_times(["soon"], data)


def test_no_event_meets_a_dated_prompt_that_contains_it(tmp_path: Path) -> None:
    data = random_dataset(tmp_path, users=25, seed=4)
    table = pa.concat_tables(
        [pq.read_table(data / split) for split in ("profile", "train", "valid", "test")]
    )
    scored = {
        (row["user_id"], row["timestamp"])
        for split in ("valid", "test")
        for row in pq.read_table(data / split).to_pylist()
    }
    cuts = [str(int(t)) for t in np.quantile(table["timestamp"].to_numpy(), [0.2, 0.5, 0.7])]
    options = {
        "model": str(tiny_encoder(tmp_path / "model")),
        "device": "cpu",
        "progress": False,
        "max_tokens": 512,
    }
    extract(ExtractConfig(data=data, out=tmp_path / "k", level="all", cutoffs=cuts, **options))
    extract(
        ExtractConfig(data=data, out=tmp_path / "k", level="all", cutoffs=cuts, **options)
    )  # resumes
    assert store_paths(tmp_path / "k" / "item") == [tmp_path / "k" / "item"]
    assert len(store_paths(tmp_path / "k" / "scenario")) == 3
    dated = DatedStores.open(tmp_path / "k" / "user")
    texts = [
        text["prompt"] for store in dated.stores for text in store.read_text(np.arange(len(store)))
    ]
    title = {r["item_id"]: r["title"] for r in pq.read_table(data / "items.parquet").to_pylist()}
    rows = KnowledgeJoin(*dated.stores).rows(table["user_id"], table["timestamp"].to_numpy())
    past: dict[int, list[dict]] = {}
    for row in table.to_pylist():
        past.setdefault(row["user_id"], []).append(row)
    used, fresh = set(), 0
    for event, at in zip(table.to_pylist(), rows.tolist(), strict=True):
        if at < 0:
            continue
        used.add(int(np.searchsorted(dated.offsets, at, side="right")))
        own = past[event["user_id"]]
        before = {
            r["item_id"]
            for r in own
            if r["timestamp"] < event["timestamp"] and (r["user_id"], r["timestamp"]) not in scored
        }
        shown = {item for item in title if title[item] in texts[at]}
        assert shown <= before
        fresh += event["item_id"] not in before
    assert used == {1, 2, 3}
    assert fresh > 50
    # Tomorrow's store from today's: only changed prompts are read again.
    newest, successor = dated.stores[-1], tmp_path / "next"
    done = refresh(newest.path, data, successor, cutoff=int(cuts[-1]) + 60, model=options["model"])
    assert done.kept > 0
    assert KnowledgeStore.open(successor).manifest.cutoff.value == int(cuts[-1]) + 60
    DatedStores([*dated.stores, KnowledgeStore.open(successor)])


def test_a_run_names_its_dates_in_its_fingerprint(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path)
    users = KnowledgeStore.open(stores / "user").keys().tolist()
    facts = argparse.Namespace(
        user_id_type="int64", item_id_type="int64", scenario_id_type="string"
    )
    for time in (1_000_100, 1_000_300):
        dated_store(tmp_path / "dated" / f"cutoff-{time}", time, users)
    config = make_config(data, stores, tmp_path / "run", knowledge__user=tmp_path / "dated")
    opened = open_stores(config.knowledge, facts)["user"]
    assert opened.fingerprint == "+".join(store.fingerprint for store in opened.stores)
    paths = [str(path) for path in store_paths(tmp_path / "dated")]
    listed = make_config(data, stores, tmp_path / "run", knowledge__user=paths[::-1])
    assert open_stores(listed.knowledge, facts)["user"].fingerprint == opened.fingerprint
    fewer = make_config(data, stores, tmp_path / "run", knowledge__user=paths[:1])
    assert open_stores(fewer.knowledge, facts)["user"].fingerprint == opened.stores[0].fingerprint
    other = make_config(data, stores, tmp_path / "run", knowledge__user=stores / "scenario")
    with pytest.raises(InputError, match=r"knowledge\.user: .* is a store of level scenario"):
        open_stores(other.knowledge, facts)
