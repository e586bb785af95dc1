"""Texts of a log's items, the schema's words, and checksums of what was written."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llm_knowledge.errors import InputError
from llm_knowledge.yaml_files import read_yaml
from tests.helpers.log_data import SCHEMA, logged, prepare, random_log, read_rows, write_log
from trainer.data.dataset import open_dataset, split_files, validate_dataset
from trainer.data.loading.row_groups import RowGroups
from trainer.data.sources.append import append_parquet
from trainer.data.sources.log_schema import load_schema
from trainer.data.sources.parquet_log import prepare_parquet

RULES = SCHEMA | {"catalogue": {"path": "items.parquet"}}


def write_catalogue(
    tmp_path: Path, log: dict, ids: list, rules: dict = RULES, **columns: list
) -> tuple[Path, Path]:
    raw, schema = write_log(tmp_path / "raw", log, rules)
    columns = {"item_id": ids, "title": [f"Title {n}" for n in range(len(ids))]} | columns
    pq.write_table(pa.table(columns), tmp_path / "raw/items.parquet")
    return raw, schema


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("spell", "hint"),
    [
        (lambda item: item + 1_000, "is it the catalogue of another log"),
        (lambda item: f"{item:05d}", r"'00001' for '1'"),
        (lambda item: f" {item}", r"' 1' for '1'"),
        (lambda item: f"ITEM{item}", r"'ITEM0' for 'item0'"),
    ],
)
def test_a_catalogue_that_joins_nothing_is_refused(tmp_path: Path, spell, hint: str) -> None:
    log = random_log(300)
    ids = [spell(item) for item in range(60)]
    if isinstance(ids[0], str):
        plain = "item" if ids[0].startswith("ITEM") else ""
        log["item_id"] = [f"{plain}{item}" for item in log["item_id"]]
    raw, schema = write_catalogue(tmp_path, log, ids)
    with pytest.raises(InputError, match=rf"items.parquet: column 'item_id': 0 of .*{hint}"):
        prepare_parquet(raw, tmp_path / "out", schema)
    assert not (tmp_path / "out").exists()


def test_few_texts_and_other_spellings_are_warned_of(tmp_path: Path) -> None:
    log = random_log(600, strings=True)
    items = sorted(set(log["item_id"]))
    for known, words in (
        (items[:10], [f"only 10 of {len(items)} items of the log"]),
        (
            [*items[:-1], items[-1].upper()],
            [f"only {len(items) - 1} of", "1 are there in another spelling"],
        ),
        (items, []),
    ):
        raw, schema = write_catalogue(tmp_path, log, known)
        with logged() as messages:
            prepare_parquet(raw, tmp_path / f"out-{len(words)}", schema)
        text = "\n".join(messages)
        assert all(word in text for word in words)
        assert ("only" in text) == bool(words)
        assert "items of the log (" in text
    raw, schema = write_log(tmp_path / "raw", log)
    with logged() as messages:
        prepare_parquet(raw, tmp_path / "none", schema)
    assert any("names no catalogue" in message for message in messages)


def test_a_day_may_bring_new_items_alone_but_no_other_catalogue(tmp_path: Path) -> None:
    rules = RULES | {"split": {"rule": "global_time"}}
    log = random_log(300)
    raw, schema = write_catalogue(tmp_path, log, list(range(60)), rules)
    prepare_parquet(raw, tmp_path / "out", schema)
    later = log | {"timestamp": [time + 1_000 for time in log["timestamp"]]}
    day, schema = write_catalogue(tmp_path, later, [1_000], rules)
    append_parquet(day, tmp_path / "out", tmp_path / "next", schema)
    rules = rules | {"positive_name": "bought"}
    day, schema = write_catalogue(tmp_path, later, [1_000], rules)
    with pytest.raises(InputError, match=r"positive_name is 'bought', but 'liked' in"):
        append_parquet(day, tmp_path / "out", tmp_path / "other", schema)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"title": [["a"]] * 60}, r"'title' .*is list.*must be text"),
        ({"title": [{"x": 1}] * 60}, r"'title' .*is struct.*must be text"),
        ({"tags": [{"x": 1}] * 60}, r"'tags' .*is struct.*must be text or a list of texts"),
        ({"tags": [[["a"]]] * 60}, r"'tags' .*must be text or a list of texts"),
        ({"tags": [1] * 60}, r"'tags' .*is int64, must be text or a list of texts"),
    ],
)
def test_texts_are_texts(tmp_path: Path, columns: dict, words: str) -> None:
    rules = RULES | {"catalogue": {"path": "items.parquet", "categories": "tags"}}
    columns = {"tags": ["a"] * 60} | columns
    raw, schema = write_catalogue(tmp_path, random_log(100), list(range(60)), rules, **columns)
    with pytest.raises(InputError, match=f"items.parquet: column {words}"):
        prepare_parquet(raw, tmp_path / "out", schema)


def test_categories_are_stripped_and_entities_unescaped(tmp_path: Path) -> None:
    log = random_log(300)
    titles = {"title": ["Salt &amp; pepper &lt;new&gt;", "&#x48;i", "plain", "R&D"]}
    tags = {"tags": ["Comedy | Drama", " a&amp;b|", "| |", None]}
    for unescape, title, tag in (
        (True, "Salt & pepper <new>", "a&b"),
        (False, "Salt &amp; pepper &lt;new&gt;", "a&amp;b"),
    ):
        catalogue = {"path": "items.parquet", "categories": "tags", "unescape_html": unescape}
        raw, schema = write_catalogue(
            tmp_path, log, [0, 1, 2, 3], RULES | {"catalogue": catalogue}, **titles, **tags
        )
        prepare_parquet(raw, tmp_path / f"out-{unescape}", schema)
        rows = pq.read_table(tmp_path / f"out-{unescape}/items.parquet").slice(0, 4).to_pylist()
        assert [row["categories"] for row in rows] == [["Comedy", "Drama"], [tag], [], []]
        assert rows[0]["title"] == title
        assert rows[3]["title"] == "R&D"


# ---------------------------------------------------------------- the schema


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "the key 'name' of line 1.*stands here again"),
        ("columns: {label: x}\nlabels: {a: y, a: z}\n", "the key 'a' of line 2"),
        ("columns: {user_id: x, item_id: x}\n", "column 'x' is given for user_id and for item_id"),
        ("labels: {bought: label}\n", "column 'label' is given for label and for labels.bought"),
        ("labels: {a: x, b: x}\n", "column 'x' is given for labels.a and for labels.b"),
        ("[" * 20_000, "YAML"),
        ("negatives: {rule: sampled, seed: 3}\n", "rule stands alone"),
        ("negatives: {seed: 3}\n", "give rule, .* or per_positive"),
        ("negatives: {per_positive: 0}\n", "negatives.per_positive"),
        ("columns: {label: none}\n", "goes with negatives.per_positive only"),
    ],
)
def test_what_a_schema_may_not_say(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "schema.yaml"
    file.write_text(text + "scenarios: [{scenario_id: 1, name: A, description: b}]\n")
    with pytest.raises(InputError, match=words):
        load_schema(file)


def test_words_stay_words(tmp_path: Path) -> None:
    file = tmp_path / "schema.yaml"
    words = ["NO", "on", "off", "yes", "y", "24:30:00", "2024-01-01", "005", "0x1F", "1_000", "0o7"]
    file.write_text("".join(f"- {word}\n" for word in words))
    assert read_yaml(file) == words
    file.write_text("[true, False, 5, -3, 1.5, 1e3, .inf, ~, null, 0, 'x', {a: &b [1]}, *b]")
    assert read_yaml(file) == [
        True,
        False,
        5,
        -3,
        1.5,
        1e3,
        float("inf"),
        None,
        None,
        0,
        "x",
        {"a": [1]},
        [1],
    ]
    log = random_log(300)
    log["scenario_id"] = ["NO" if value == 1 else "on" for value in log["scenario_id"]]
    raw, schema = write_log(tmp_path / "raw", log)
    schema.write_text(
        "scenarios:\n- {scenario_id: NO, name: Norway, description: d}\n"
        "- {scenario_id: on, name: O, description: d}\n"
        "split: {rule: per_user_time}\n"
    )
    info = prepare_parquet(raw, tmp_path / "out", schema)
    assert [scenario.scenario_id for scenario in info.scenarios] == ["NO", "on"]


def test_sampled_negatives_have_no_name_by_default(tmp_path: Path) -> None:
    file = tmp_path / "schema.yaml"
    base = {"scenarios": SCHEMA["scenarios"]}
    for negatives, given, name in (
        (None, {}, "disliked"),
        ({"rule": "four each"}, {}, None),
        ({"per_positive": 4}, {}, None),
        ({"rule": "four each"}, {"negative_name": "shown"}, "shown"),
    ):
        file.write_text(
            yaml.safe_dump(base | given | ({"negatives": negatives} if negatives else {}))
        )
        assert load_schema(file).negative_name == name


def test_most_test_positives_of_new_items_are_warned_of(tmp_path: Path) -> None:
    log = random_log(1_000) | {"item_id": list(range(1_000))}
    with logged() as messages:
        prepare(tmp_path, log)
    assert any("are of items without a positive in train" in message for message in messages)
    (tmp_path / "usual").mkdir()
    with logged() as messages:
        prepare(tmp_path / "usual", random_log(1_500))
    assert not any("without a positive" in message for message in messages)


# ---------------------------------------------------------------- checksums


def test_every_flipped_bit_of_a_part_is_found(tmp_path: Path) -> None:
    out = prepare(tmp_path, random_log(4_000))
    part = split_files(out, "train")[0]
    whole, rows = part.read_bytes(), read_rows(out, "train")
    footer = int.from_bytes(whole[-8:-4], "little")
    draw = random.Random(1)
    places = [draw.randrange(len(whole)) for _ in range(150)]
    places += [draw.randrange(len(whole) - 8 - footer, len(whole)) for _ in range(150)]
    found = 0
    for place in places:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << draw.randrange(8)
        part.write_bytes(spoiled)
        try:
            validate_dataset(out)
            groups = RowGroups([part])
            columns = list(rows[0])
            read = [
                row
                for group in range(len(groups))
                for row in groups.read(columns, group)[0].to_pylist()
            ]
        except InputError:
            found += 1
        else:
            assert read == rows, place  # such as a byte that no reader looks at
    assert found > 290


def test_a_dataset_from_before_checksums_is_read(tmp_path: Path) -> None:
    out = prepare(tmp_path, random_log(400))
    info = open_dataset(out)
    assert set(info.footers) == {
        "items.parquet",
        *(f"{split}/part-00000.parquet" for split in ("profile", "train", "valid", "test")),
    }
    part = split_files(out, "train")[0]
    pq.write_table(pq.read_table(part), part)
    with pytest.raises(InputError, match=r"part-00000.parquet: its footer is not the one"):
        validate_dataset(out)
    old = info.model_dump_json(exclude={"footers", "timestamps"})
    (out / "dataset.json").write_text(old)
    assert validate_dataset(out).footers == {}
    assert RowGroups([part]).total_rows == info.rows["train"]
