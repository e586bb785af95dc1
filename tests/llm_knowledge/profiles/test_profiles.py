import json
from unicodedata import ucd_3_2_0

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
from llm_knowledge.profiles.queries import _readable
from llm_knowledge.prompts import Renderer, clean, load_template
from tests.helpers.knowledge_data import NOTHING, SPLITS, random_dataset, write_dataset


def profiles(path, level, rows=256, **options):
    batches = list(
        profile_batches(Dataset.open(path), level, ProfileOptions(**options), rows, path)
    )
    return {
        row["key"]: (row["cutoff"], json.loads(row["data"]))
        for batch in batches
        for row in batch.to_pylist()
    }


def prompts(path, level, template):
    dataset = Dataset.open(path)
    renderer = Renderer(
        load_template(template, level),
        dataset.scenarios,
        dataset.positive_name,
        dataset.negative_name,
        lambda texts: [len(t) for t in texts],
        10**6,
    )
    found = profiles(path, level, tastes=template == "user_tastes")
    return {key: (cutoff, renderer.render([data])[0]) for key, (cutoff, data) in found.items()}


def event(user, item, scenario, time, label):
    return {
        "user_id": user,
        "item_id": item,
        "scenario_id": scenario,
        "timestamp": time,
        "label": label,
    }


ITEMS = [{"item_id": i, "title": f"title{i}", "categories": ["c"]} for i in range(8)] + [
    {"item_id": 8, "title": "", "categories": ["pots", "pans"]},
    {"item_id": 9, "title": "", "categories": []},
]


def small(path, negative_name="disliked", **options):
    events = [
        event(1, 0, "food", 10, 1),
        event(1, 1, "food", 20, 0),
        event(1, 2, "food", 20, 1),
        event(1, 3, "kitchen", 15, 1),
        event(1, 4, "food", 30, 1),
        event(1, 0, "food", 40, 0),
        event(2, 8, "food", 5, 1),
        event(2, 9, "food", 6, 1),
        event(3, 1, "food", 7, 0),
    ]
    later = [event(1, 5, "food", 50, 1), event(4, 5, "food", 1, 1)]
    return write_dataset(
        path, {"profile": events, "train": later}, ITEMS, negative_name=negative_name, **options
    )


def test_user_profile_is_recent_first_with_newest_label(tmp_path):
    found = profiles(small(tmp_path), "user")
    assert list(found) == [1, 2, 3]  # user 4 has no profile event
    cutoff, data = found[1]
    assert cutoff == 40
    shown = [(item["title"], item["liked"], item["scenario"]) for item in data["items"]]
    assert shown == [
        ("title0", False, "food"),
        ("title4", True, "food"),
        ("title1", False, "food"),
        ("title2", True, "food"),
        ("title3", True, "kitchen"),
    ]
    assert (data["met"], data["liked"]) == (5, 3)  # items, by their newest label
    # No title: its categories; neither: left out. The cut-off counts every event.
    assert [item["title"] for item in found[2][1]["items"]] == ["pots, pans"]
    assert found[2][0] == 6


def test_sampled_negatives_never_enter(tmp_path):
    found = profiles(small(tmp_path, negative_name=None), "user")
    assert list(found) == [1, 2]  # of user 3 nothing but a negative is there
    # A purchase stays one, though its item was drawn as a negative later.
    shown = [(item["title"], item["liked"]) for item in found[1][1]["items"]]
    assert shown == [("title4", True), ("title2", True), ("title3", True), ("title0", True)]
    assert found[1][0] == 30


def test_sampled_negatives_are_no_events_of_dated_profiles(tmp_path):
    """Training holds sampled negatives, and a cut-off lets training events in."""
    bought = [(1, 0, "food", 10), (2, 1, "food", 20), (2, 2, "kitchen", 22)]
    drawn = [
        (1, 3, "food", 10),
        (1, 4, "food", 10),
        (2, 5, "food", 20),
        (2, 6, "kitchen", 22),
        (1, 7, "kitchen", 10),
        (1, 1, "kitchen", 30),
    ]
    rows = [event(*row, label=1) for row in bought] + [event(*row, label=0) for row in drawn]
    events = {"profile": [event(2, 0, "food", 5, 1)], "train": rows}
    path = write_dataset(tmp_path / "sampled", events, ITEMS, negative_name=None)
    food, kitchen = (data for _, data in profiles(path, "scenario", cutoff=40).values())
    assert (food["events"], food["users"], food["items"], food["rate"]) == (3, 2, 2, None)
    assert (kitchen["events"], kitchen["users"], kitchen["items"]) == (1, 1, 1)
    assert food["others"][0]["common_users"] == 0.5  # user 1 bought nothing in the kitchen
    assert list(profiles(path, "user", cutoff=40, min_interactions=3)) == [2]
    with pytest.raises(InputError, match=r"no user has 4 events .* the most that one has is 3"):
        profiles(path, "user", cutoff=40, min_interactions=4)
    only = write_dataset(tmp_path / "none", {"train": rows[3:]}, ITEMS, negative_name=None)
    for level in ("user", "scenario"):
        with pytest.raises(InputError, match=r"no event up to .*label 0 means nothing here"):
            profiles(only, level, cutoff=40)
    # Where label 0 is an opinion, it is an event.
    path = write_dataset(tmp_path / "rated", events, ITEMS)
    assert profiles(path, "scenario", cutoff=40)["food"][1]["events"] == 6
    assert list(profiles(path, "user", cutoff=40, min_interactions=5)) == [1, 2]


def test_the_newest_purchase_dates_a_scenario(tmp_path):
    rows = [event(1, 0, "food", 10, 1), event(1, 1, "food", 30, 0)]
    for negative_name, newest in ((None, 10), ("disliked", 30)):
        path = write_dataset(
            tmp_path / str(negative_name),
            {"profile": rows},
            ITEMS,
            rule="global_time",
            negative_name=negative_name,
        )
        assert profiles(path, "scenario")["food"][0] == newest


def test_tastes_are_categories_liked_more_or_less_than_the_users_others(tmp_path):
    kinds = [["a", "b"], ["a"], ["b", "a", "a"], ["c"], ["c", "d"], ["d"], ["even"], ["even"]]
    items = [{"item_id": i, "title": "", "categories": kinds[i]} for i in range(8)]
    liked = [event(1, i, "food", i, label) for i, label in enumerate([1, 1, 1, 0, 0, 0, 1, 0])]
    once = [event(2, 0, "food", 1, 1)]  # everything liked: nothing is liked more
    path = write_dataset(tmp_path, {"profile": liked + once}, items)
    found = profiles(path, "user", tastes=True)
    # Half of 8 is liked. a: (3 + 1.5) / (3 + 3) - .5, b: (2 + 1.5) / (2 + 3) - .5; "even" is even.
    assert found[1][1]["tastes"] == [
        {"category": "a", "liked": True},
        {"category": "b", "liked": True},
        {"category": "c", "liked": False},
        {"category": "d", "liked": False},
    ]
    assert found[2][1]["tastes"] == []
    assert "tastes" not in profiles(path, "user")[1][1]
    text = prompts(path, "user", "user_tastes")[1][1].split("\n\n")
    assert text[:3] == ["Liked about half.", "Prefers a, b.", "Not c, d."]
    without = write_dataset(tmp_path / "sampled", {"profile": liked}, items, negative_name=None)
    assert "tastes" not in profiles(without, "user", tastes=True)[1][1]


def test_limits_per_scenario_and_total(tmp_path):
    rows = [event(1, i, "food", i, 1) for i in range(6)] + [event(1, 6, "kitchen", 0, 1)]
    path = write_dataset(tmp_path, {"profile": rows}, ITEMS)
    titles = lambda **o: [i["title"] for i in profiles(path, "user", **o)[1][1]["items"]]  # noqa: E731
    assert titles(per_scenario=2) == ["title5", "title4", "title6"]
    assert titles(per_scenario=4, total=3) == ["title5", "title4", "title3"]


def test_batches_have_the_asked_size_and_sorted_keys(tmp_path):
    path = random_dataset(tmp_path, users=11, id_type="string")
    batches = list(profile_batches(Dataset.open(path), "user", ProfileOptions(), 4, tmp_path))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    keys = [key for batch in batches for key in batch["key"].to_pylist()]
    assert keys == sorted(keys, key=str.encode)
    again = list(
        profile_batches(Dataset.open(path), "user", ProfileOptions(threads=1), 4, tmp_path)
    )
    assert [b.to_pylist() for b in again] == [b.to_pylist() for b in batches]


@pytest.mark.parametrize("template", ["user", "user_plain", "user_tastes"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_no_event_meets_a_prompt_that_contains_it(tmp_path, template, id_type):
    path = random_dataset(tmp_path, users=30, id_type=id_type)
    texts = prompts(path, "user", template)
    split = {name: pq.read_table(path / name).to_pylist() for name in SPLITS}
    seen: dict = {}
    for row in split["profile"]:
        seen.setdefault(row["user_id"], set()).add(row["item_id"])
    checked = 0
    title = {r["item_id"]: r["title"] for r in pq.read_table(path / "items.parquet").to_pylist()}
    for name in ("train", "valid", "test"):
        for row in split[name]:
            cutoff, text = texts[row["user_id"]]
            assert cutoff < row["timestamp"]
            if row["item_id"] not in seen[row["user_id"]]:
                assert title[row["item_id"]] not in text
                checked += 1
    assert checked > 100
    # And what is in the prompt did happen in the profile window, at or before the cut-off.
    for user, (cutoff, text) in texts.items():
        own = {r["item_id"]: r["timestamp"] for r in split["profile"] if r["user_id"] == user}
        assert max(own.values()) == cutoff
        assert {i for i in title if title[i] in text} <= set(own)


def test_later_splits_do_not_change_any_profile(tmp_path):
    one, two = random_dataset(tmp_path / "a"), random_dataset(tmp_path / "b")
    for name in SPLITS[1:]:
        (two / name / "part-00000.parquet").unlink()
    for level in ("user", "scenario", "item"):
        assert profiles(one, level) == profiles(two, level)
        assert Dataset.open(one).fingerprint(level) == Dataset.open(two).fingerprint(level)


@pytest.mark.parametrize("template", ["scenario", "scenario_plain"])
def test_scenario_prompt_has_categories_and_no_title(tmp_path, template):
    path = random_dataset(tmp_path, users=60)
    texts = prompts(path, "scenario", template)
    assert list(texts) == ["food", "kitchen"]
    for cutoff, text in texts.values():
        assert cutoff is None  # split per user: no global cut-off exists
        assert "Thing" not in text
        assert "kind" in text
        assert "users are also in" in text


def test_scenario_numbers_and_global_cutoff(tmp_path):
    rows = [event(u, u % 4, "food", u, 1) for u in range(4)] + [event(0, 5, "kitchen", 9, 0)]
    items = [
        {"item_id": i, "title": "secret", "categories": ["a" if i < 3 else "b"]} for i in range(6)
    ]
    path = write_dataset(
        tmp_path,
        {"profile": rows},
        items,
        rule="global_time",
        scenarios=("food", "kitchen", "empty"),
    )
    found = profiles(path, "scenario")
    assert [cutoff for cutoff, _ in found.values()] == [9, 9, 9]
    food = found["food"][1]
    assert (food["events"], food["users"], food["items"], food["rate"]) == (4, 4, 4, 1.0)
    assert food["top_categories"] == ["a", "b"]
    kitchen = {other["name"]: other for other in food["others"]}["Kitchen"]
    assert kitchen["common_users"] == 0.25
    assert kitchen["category_similarity"] == 0.0  # nothing is liked in kitchen
    assert found["empty"][1]["events"] == 0
    assert "secret" not in json.dumps(found)


def test_item_profile(tmp_path):
    found = profiles(small(tmp_path), "item")
    assert found[8] == (None, {"title": "", "categories": ["pots", "pans"]})
    assert list(found) == list(range(10))


def test_hostile_titles_pass_the_database_whole(tmp_path):
    titles = [
        "'; DROP TABLE items; --",
        "😀👩‍👩‍👧 émoji",
        "שלום עולם",
        "x" * 10_000,
        'quote " \\ {0}',
    ]
    items = [{"item_id": i, "title": t, "categories": []} for i, t in enumerate(titles)]
    rows = [event(1, i, "food", 9 - i, 1) for i in range(5)]
    path = write_dataset(tmp_path, {"profile": rows}, items)
    found = [item["title"] for item in profiles(path, "user")[1][1]["items"]]
    assert found == [titles[0], titles[1], titles[2], "x" * 1000, titles[4]]


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_what_a_reader_cannot_see_is_no_title_and_no_category(tmp_path, text):
    """The queries see as little as ``clean`` does."""
    titles = [(text, [text, "seen"]), (text, [text, text]), ("shown" + text, [text])]
    items = [
        {"item_id": i, "title": title, "categories": kinds}
        for i, (title, kinds) in enumerate(titles)
    ]
    rows = [event(1, i, "food", 9 - i, 1) for i in range(3)]
    path = write_dataset(tmp_path, {"profile": rows}, items)
    found = [data for _, data in profiles(path, "item").values()]
    assert found == [
        {"title": "", "categories": ["seen"]},
        {"title": "", "categories": []},
        {"title": "shown" + text, "categories": []},
    ]
    listed = [item["title"] for item in profiles(path, "user")[1][1]["items"]]
    assert listed == ["seen", "shown" + text]
    assert profiles(path, "scenario")["food"][1]["top_categories"] == ["seen"]


def test_queries_and_prompts_agree_on_every_character_that_is_not_seen():
    # Those of an old Unicode, whose categories the tables of Python and DuckDB share, and all tags.
    codes = [
        code
        for code in [*range(1, 0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE1000)]
        if ucd_3_2_0.category(chr(code)) != "Cn" or code >= 0xE0000
    ]
    table = pa.table({"code": codes, "text": list(map(chr, codes))})
    database = duckdb.connect().register("characters", table)
    query = f"SELECT code FROM characters WHERE {_readable('text')} = ''"
    unseen = {code for (code,) in database.execute(query).fetchall()}
    assert unseen == {code for code in codes if not clean(chr(code))}


def test_bad_datasets_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"dataset.json: not found"):
        Dataset.open(tmp_path)
    path = small(tmp_path / "d")
    about = json.loads((path / "dataset.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format_version is 2"),
        ({"scenarios": None}, "field 'scenarios' is None"),
    ):
        (path / "dataset.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(InputError, match=message):
            Dataset.open(path)
    (path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        Dataset.open(path)
    (path / "dataset.json").write_text(json.dumps({**about, "scenarios": about["scenarios"][:1]}))
    with pytest.raises(InputError, match=r"scenario_id 'kitchen' is not in dataset.json"):
        profiles(path, "scenario")
    part = path / "profile" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.rename_columns(["uid", *table.column_names[1:]]), part)
    with pytest.raises(InputError, match="user_id"):
        profiles(path, "user")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        profiles(path, "user")
    part.unlink()
    with pytest.raises(InputError, match="the profile split is empty"):
        profiles(path, "user")
