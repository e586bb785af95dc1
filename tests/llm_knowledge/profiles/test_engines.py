"""The same profiles from every engine, from whole logs and from buckets of users."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import llm_knowledge.profiles.engines as engines
from llm_knowledge.errors import InputError
from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
from llm_knowledge.profiles.engines import open_engine
from tests.helpers.knowledge_data import HOSTILE, NOTHING, random_dataset, write_dataset
from trainer.data.sources.movielens import find_movielens, prepare_movielens
from trainer.data.sources.simulate import simulate

LEVELS = ("user", "item", "scenario")
no_spark = (
    "no Java on this machine"
    if shutil.which("java") is None
    else "PySpark is not installed: pip install -r requirements/spark.txt"
    if importlib.util.find_spec("pyspark") is None
    else ""
)
spark = pytest.mark.skipif(bool(no_spark), reason=no_spark)

INVISIBLE = "\u200b\u00a0\x07\u202e "
TITLES = [
    "plain", "", None, "   ", INVISIBLE, HOSTILE,
    "😀👩‍👩‍👧 émoji ﬁ", "שלום עולם", "x" * 10_000, "'; DROP TABLE items; --",
    "tab\there", "line\nbreak\r\n", "\u2028separator\u2029", '"quoted" \\ /slash/ </script>', "\ue000private",
    "".join(map(chr, range(1, 33))) + "\x7f\x80\x9f", "𝄞 clef and \U0010ffff", "ｆｕｌｌ width", "İıſK",
    "{0} {title}",
    "é", "e\u0301", "Z", "a", "Ä", "z", "😀", "\ufffd",
    *NOTHING.values(),
]  # fmt: skip


def rows(data: Path, level: str, scratch: Path, **options) -> list[dict]:
    batches = profile_batches(Dataset.open(data), level, ProfileOptions(**options), 50, scratch)
    return [row for batch in batches for row in batch.to_pylist()]


def hostile(path: Path, id_type: str, negative_name: str | None = "disliked") -> Path:
    """Every kind of title and category, ties in time, repeated items, keys in many scripts."""
    name = (lambda i: i - 9) if id_type == "int64" else (lambda i: f"{TITLES[-1 - i % 9]}{i}")
    kinds = [["a", None, "b", "a"], [], [""], [INVISIBLE, NOTHING["tags"]], ["😀, kitchen"], None]
    items = [
        {"item_id": name(i), "title": title, "categories": kinds[i % len(kinds)]}
        for i, title in enumerate(TITLES)
    ]
    events = [
        {
            "user_id": name(k % 37 * 3),
            "item_id": name(k * k % len(TITLES)),
            "scenario_id": ("food", "kitchen", "ärger")[k * 7 % 3],
            "timestamp": k * 11 % 23 - 5,
            "label": int(k % 5 < 3),
        }
        for k in range(1_500)
    ]
    return write_dataset(
        path,
        {"profile": events[:1_200], "train": events[1_200:]},
        items,
        id_type=id_type,
        negative_name=negative_name,
        scenarios=("food", "kitchen", "ärger", "empty"),
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logs")
    for name in ("integers", "strings", "positives"):
        (folder / name).mkdir()
    simulate(folder / "simulated", users=120, items=90, scenarios=3, events=3_000, seed=5)
    found = {
        "integers": hostile(folder / "integers", "int64"),
        "strings": hostile(folder / "strings", "string"),
        "positives": hostile(folder / "positives", "int64", negative_name=None),
        "simulated": folder / "simulated",
    }
    movielens = find_movielens()
    if movielens is not None:
        prepare_movielens(movielens, folder / "movielens")
        found["movielens"] = folder / "movielens"
    return found


@pytest.fixture(scope="module")
def one_session(tmp_path_factory: pytest.TempPathFactory):
    """Starting Spark takes seconds: a session that is there is used and left as it is."""
    with open_engine("spark", tmp_path_factory.mktemp("spark"), "1GB", 2):
        yield


@spark
@pytest.mark.slow
def test_spark_and_duckdb_give_the_same_profiles(logs, one_session, tmp_path: Path) -> None:
    small = {"per_scenario": 2, "total": 3, "min_interactions": 25}
    cases: list[tuple[str, str, dict]] = [
        *[(name, "user", {"tastes": True}) for name in logs if name != "integers"],
        ("integers", "user", small),
        ("strings", "user", {"cutoff": 9}),
        ("positives", "scenario", {"cutoff": 9}),
        *[(name, "item", {}) for name in ("integers", "strings")],
        *[(name, "scenario", {}) for name in logs if name != "positives"],
    ]
    for name, level, options in cases:
        one = rows(logs[name], level, tmp_path, **options)
        other = rows(logs[name], level, tmp_path, **options, engine="spark", threads=2)
        assert one, (name, level)
        assert one == other, (name, level, options)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_buckets_of_users_change_nothing(logs, tmp_path: Path, monkeypatch, threads: int) -> None:
    for data in logs.values():
        whole = rows(data, "user", tmp_path, threads=threads, tastes=True)
        events = json.loads((data / "dataset.json").read_text())["rows"]["profile"]
        monkeypatch.setattr(engines, "BUCKET_EVENTS", events // 6)
        assert rows(data, "user", tmp_path, threads=threads, tastes=True) == whole
        monkeypatch.undo()
        assert not list((tmp_path / "buckets").iterdir())


def test_invisible_titles_are_no_titles(logs, tmp_path: Path) -> None:
    for name in ("integers", "strings"):
        shown = [
            text["title"]
            for row in rows(logs[name], "user", tmp_path)
            for text in json.loads(row["data"])["items"]
        ]
        assert INVISIBLE not in shown
        assert "😀, kitchen" in shown  # the category of an item without a title
        assert max(map(len, shown)) == 1000


def test_unknown_and_missing_engines_are_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="'flink': want one of duckdb, spark"):
        open_engine("flink", tmp_path, "1GB", None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no Java is found"):
        open_engine("spark", tmp_path, "1GB", None)


def test_a_threshold_that_nobody_reaches_is_refused(tmp_path: Path) -> None:
    data = random_dataset(tmp_path, users=5)  # 8 profile events each, 16 with training
    assert len(rows(data, "user", tmp_path, min_interactions=8)) == 5
    with pytest.raises(InputError, match=r"no user has 9 events in .*; the most that one has is 8"):
        rows(data, "user", tmp_path, min_interactions=9)
    with pytest.raises(InputError, match=r"no event up to the cut-off 5: no user has a profile"):
        rows(data, "user", tmp_path, cutoff=5)
