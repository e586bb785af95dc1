"""MovieLens and Food-Kitchen, on small samples made here."""

import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.log_data import all_rows, read_rows
from tests.helpers.paths import ROOT
from trainer.data.dataset import validate_dataset
from trainer.data.sources import food_kitchen, movielens
from trainer.data.sources.food_kitchen import prepare_food_kitchen
from trainer.data.sources.movielens import prepare_movielens

SHARED = ROOT / "../shared/data"


# ---------------------------------------------------------------- MovieLens


def movielens_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = [
        f"{user},{1 + (user + n) % 4},{(1 + n % 10) / 2},{1_000_000_000 + 10 * n}"
        for user in (1, 2)
        for n in range(20)
    ]
    (folder / "ratings.csv").write_text(
        "\n".join(["userId,movieId,rating,timestamp", *lines]) + "\n"
    )
    (folder / "movies.csv").write_text(
        "movieId,title,genres\r\n"
        '1,"Heat, The (1995)",Action|Comedy\r\n'
        "2,Amélie (2001),Comedy|Romance\r\n"
        "3,Nixon (1995),Drama\r\n"
        "4,Odd (2000),(no genres listed)\r\n"
    )
    return folder


def test_movielens_sample(tmp_path):
    raw = movielens_folder(tmp_path / "raw")
    info = prepare_movielens(raw, tmp_path / "out")
    assert info.rows == {"profile": 16, "train": 16, "valid": 4, "test": 4}
    assert validate_dataset(tmp_path / "out").positive_name == "liked"
    items = {
        row["item_id"]: row for row in pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    }
    assert items[1]["title"] == "Heat, The (1995)"
    assert items[1]["categories"] == ["Action", "Comedy"]
    assert items[4]["categories"] == []
    groups = {1: "action_thriller", 2: "comedy_family", 3: "drama_other", 4: "drama_other"}
    for row in all_rows(tmp_path / "out"):
        assert row["scenario_id"] == groups[row["item_id"]]
        step = (row["timestamp"] - 1_000_000_000) // 10
        assert row["label"] == ((1 + step % 10) / 2 >= 4)


def test_movielens_bad_values_are_refused(tmp_path):
    raw = movielens_folder(tmp_path / "raw")
    good = (raw / "ratings.csv").read_text()
    bad = {
        "timestamp": good.replace("timestamp", "time"),
        "between 0.5 and 5": good.replace("1,2,0.5,", "1,2,9.5,"),
        "not as MovieLens": good.replace("1,2,0.5,", "1,2,many,"),
    }
    for words, content in bad.items():
        (raw / "ratings.csv").write_text(content)
        with pytest.raises(InputError, match=words):
            prepare_movielens(raw, tmp_path / "out")
    (raw / "ratings.csv").unlink()
    with pytest.raises(InputError, match=r"ratings\.csv is missing"):
        prepare_movielens(raw, tmp_path / "out")


def test_columns_that_differ_in_case_alone_are_refused(tmp_path):
    raw = movielens_folder(tmp_path / "movielens")
    lines = (raw / "ratings.csv").read_text().splitlines()
    rows = [f"{line},{extra}" for line, extra in zip(lines, ["Rating", *["1"] * 40], strict=True)]
    (raw / "ratings.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match="'rating' and 'Rating' differ in case at most"):
        prepare_movielens(raw, tmp_path / "out")
    raw = food_folder(tmp_path / "food")
    for file, name in (("items.parquet", "Title"), ("interactions.parquet", "POS")):
        whole = pq.read_table(raw / file)
        pq.write_table(whole.add_column(0, name, whole[name.lower()]), raw / file)
        with pytest.raises(InputError, match=f"'{name}' and '{name.lower()}' differ in case"):
            prepare_food_kitchen(raw, tmp_path / "out")
        pq.write_table(whole, raw / file)


def test_movielens_is_found_or_taken_from_an_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = movielens_folder(tmp_path / "data" / "ml-latest-small")
    monkeypatch.chdir(tmp_path)
    assert movielens.find_movielens() == raw
    archive = tmp_path / "ml.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for name in movielens.FILES:
            content.write(raw / name, f"ml-latest-small/{name}")
    info = prepare_movielens(archive, tmp_path / "out")
    assert info.users == 2
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("../evil", "x")
    with pytest.raises(InputError, match="not the archive"):
        prepare_movielens(archive, tmp_path / "other")
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("answer", [OSError("no route"), b"something else"])
def test_movielens_download_that_fails_says_how_to_get_it(tmp_path, monkeypatch, answer):
    import io
    import urllib.request

    def answer_request(url, timeout):
        assert timeout <= 30
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(movielens, "usual_places", lambda name: [])
    monkeypatch.setattr(urllib.request, "urlopen", answer_request)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="give the file or folder as --raw"):
        prepare_movielens(None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "ml-latest-small").is_dir(), reason="the data set is not here")
def test_movielens_whole(tmp_path):
    info = prepare_movielens(SHARED / "ml-latest-small", tmp_path / "out")
    assert (info.users, info.items) == (610, 9_742)
    counts = defaultdict(int)
    for row in all_rows(tmp_path / "out"):
        counts[row["scenario_id"]] += 1
    assert counts == {"action_thriller": 66_613, "comedy_family": 23_658, "drama_other": 10_565}


# ---------------------------------------------------------------- Food-Kitchen


def food_folder(folder: Path) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(3)
    items = [f"{'F' if n < 30 else 'K'}{n:02d}" for n in range(60)]
    rows = []
    for user in range(40):
        size = 5 if user == 0 else 8
        bought = draw.choice(30 if user == 1 else 60, size, replace=False)
        rows += [(f"u{user:02d}", items[n], pos) for pos, n in enumerate(bought)]
    user, item, pos = zip(*rows, strict=True)
    scenario = ["food" if name[0] == "F" else "kitchen" for name in item]
    log = {"user_id": user, "item_id": item, "scenario": scenario, "pos": pa.array(pos, pa.int16())}
    pq.write_table(pa.table(log), folder / "interactions.parquet")
    kinds = ["food"] * 30 + ["kitchen"] * 30
    titles = [f"Salt &amp; {name}" for name in items]
    table = {"item_id": items, "scenario": kinds, "title": titles}
    pq.write_table(pa.table(table), folder / "items.parquet")
    return folder


def test_food_kitchen_negatives_follow_the_rule(tmp_path):
    raw = food_folder(tmp_path / "raw")
    info = prepare_food_kitchen(raw, tmp_path / "out", negatives=3)
    assert validate_dataset(tmp_path / "out").negative_name is None
    assert info.negatives is not None
    assert "^0.75" in info.negatives.rule
    rows = all_rows(tmp_path / "out")
    users = {row["user_id"] for row in rows}
    assert not {"u00", "u01"} & users  # five events; food only
    bought = {(row["user_id"], row["item_id"]) for row in rows if row["label"]}
    assert len(bought) == 8 * len(users)
    groups = defaultdict(list)
    for row in rows:
        if not row["label"]:
            assert row["split"] != "profile"
            assert (row["user_id"], row["item_id"]) not in bought
            assert row["scenario_id"] == ("food" if row["item_id"][0] == "F" else "kitchen")
        key = (row["user_id"], row["timestamp"])
        groups[key].append((row["label"], row["item_id"], row["scenario_id"]))
        assert all((row["user_id"], item) in bought for item in row["history"])
        assert len(row["history"]) == row["timestamp"]
    profiles = {(row["user_id"], row["timestamp"]) for row in rows if row["split"] == "profile"}
    for key, group in groups.items():
        assert sum(label for label, _, _ in group) == 1
        assert len({item for _, item, _ in group}) == len(group) == (1 if key in profiles else 4)
        assert len({scenario for _, _, scenario in group}) == 1
    assert info.rows["profile"] == 4 * len(users)
    title = pq.read_table(tmp_path / "out/items.parquet")["title"][0].as_py()
    assert title == "Salt & F00"


def test_food_kitchen_is_deterministic_by_seed(tmp_path):
    raw = food_folder(tmp_path / "raw")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_food_kitchen(raw, tmp_path / name, seed=seed)
    first, again, other = (read_rows(tmp_path / name, "train") for name in "abc")
    assert first == again != other


def test_food_kitchen_sampling_prefers_popular_items():
    users, items = np.arange(400), np.r_[np.zeros(200, int), np.arange(200) % 100]
    scenarios = np.r_[np.zeros(100, int), np.ones(5, int)]
    codes = np.r_[np.zeros(200, int), np.full(200, 3)]
    drawn = food_kitchen.sample_negatives(users, items, codes, scenarios, 2, seed=0)
    counts = np.bincount(drawn.reshape(-1), minlength=105)
    assert drawn.shape == (200, 2)
    assert counts[0] > 10 * counts[1:100].mean()
    assert (counts[1:100] > 0).mean() > 0.8  # items that nobody bought are drawn too
    assert counts[100:].sum() == 0


def test_food_kitchen_bad_input(tmp_path):
    raw = food_folder(tmp_path / "raw")
    with pytest.raises(InputError, match="at least 1"):
        prepare_food_kitchen(raw, tmp_path / "out", negatives=0)
    with pytest.raises(InputError, match="catalogue is too small"):
        prepare_food_kitchen(raw, tmp_path / "out", negatives=29)
    items = pq.read_table(raw / "items.parquet")
    pq.write_table(items.slice(1), raw / "items.parquet")
    with pytest.raises(InputError, match="'F00' is not in"):
        prepare_food_kitchen(raw, tmp_path / "out")
    pq.write_table(items.drop_columns("title"), raw / "items.parquet")
    with pytest.raises(InputError, match="'title' is missing"):
        prepare_food_kitchen(raw, tmp_path / "out")
    with pytest.raises(InputError, match="no such file"):
        prepare_food_kitchen(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
