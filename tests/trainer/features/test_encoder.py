"""The encoder against a slow reading of the same rows; what it was fitted on; its files; what it refuses."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.ids import HashedIds, Vocabulary
from llm_knowledge.errors import InputError
from tests.helpers.feature_data import prepare_features
from tests.helpers.paths import ROOT
from trainer.config.features import FeaturesConfig, FeatureUse
from trainer.data.dataset import open_dataset, split_files
from trainer.features.encoder import FILE, IDS, NUMBERS, FeatureEncoder
from trainer.features.encoding import combine_ids, salt_of
from trainer.features.fit import fit_encoder
from trainer.features.ragged import Ragged
from trainer.features.resolve import resolve_features
from trainer.features.steps import GAP_ROWS, gap_rows

USE = {
    "age": FeatureUse(transform="log", scale="standard"),
    "city": FeatureUse(min_count=255),
    "tags": FeatureUse(pooling="mean"),
    "words": FeatureUse(ids="hash", rows=7),
    "author": FeatureUse(into="item"),
    "price": FeatureUse(buckets=4),
    "place_by_author": FeatureUse(cross=["city", "author", "scenario"], min_count=3),
}
TRAINED = ("profile", "train")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_features(tmp_path_factory.mktemp("features"))


def files(data: Path, *splits: str) -> list[Path]:
    return [file for split in splits for file in split_files(data, split)]


@pytest.fixture(scope="module")
def encoder(data: Path) -> FeatureEncoder:
    features = resolve_features(FeaturesConfig(use=USE), open_dataset(data))
    return fit_encoder(features, files(data, *TRAINED))


def rows(data: Path, *splits: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in files(data, *splits)])


def test_ids_are_numbered_by_what_the_training_splits_hold(
    data: Path, encoder: FeatureEncoder
) -> None:
    seen = rows(data, *TRAINED).to_pylist()
    cities = Counter(row["feature_city"] for row in seen if row["feature_city"] is not None)
    common = sorted(city for city, count in cities.items() if count >= 255)
    assert 0 < len(common) < len(cities)
    authors = sorted({row["feature_author"] for row in seen} - {None})
    test = rows(data, "test")
    encoded = encoder.encode(test)[IDS]
    names = [one.name for one in encoder.single]
    for number, row in enumerate(test.to_pylist()):
        found = dict(zip(names, encoded[number].tolist(), strict=True))
        city, author = row["feature_city"], row["feature_author"]
        # Missing is not unknown: the one has no row at all, the other the row 0.
        wanted = -1 if city is None else common.index(city) + 1 if city in common else 0
        assert found["city"] == wanted
        assert found["author"] == (-1 if author is None else authors.index(author) + 1)
    assert {-1, 0} <= set(encoded[:, names.index("city")].tolist())


def test_lists_and_their_weights(data: Path, encoder: FeatureEncoder) -> None:
    seen = {tag for row in rows(data, *TRAINED).to_pylist() for tag in row["feature_tags"] or []}
    test = rows(data, "test")
    encoded = encoder.encode(test)
    tags, words = encoded["feature_tags"], encoded["feature_words"]
    hashed, order = HashedIds(7, salt_of("feature_words")), sorted(seen)
    begin = word_begin = 0
    for number, row in enumerate(test.to_pylist()):
        ids, weights = row["feature_tags"] or [], row["weights_tags"] or []
        end = begin + tags.lengths[number]
        assert tags.values[begin:end].tolist() == [order.index(tag) + 1 for tag in ids]
        assert tags.weights[begin:end] == pytest.approx(
            [w / sum(weights) for w in weights] if sum(weights) else weights
        )
        begin = end
        end = word_begin + words.lengths[number]
        wanted = hashed.lookup(pa.array(row["feature_words"], pa.string())).tolist()
        assert words.values[word_begin:end].tolist() == wanted
        word_begin = end
    assert words.weights is None
    assert 0 in tags.lengths  # a null and an empty list are the same: no ids


def log(number: float) -> float:
    return math.copysign(math.log1p(abs(number)), number)


def test_numbers_by_log_and_by_buckets(data: Path, encoder: FeatureEncoder) -> None:
    trained = rows(data, *TRAINED).to_pylist()
    logs = [log(row["feature_age"]) for row in trained if row["feature_age"] is not None]
    mean, deviation = np.mean(logs), np.std(logs)
    prices = sorted(row["feature_price"] for row in trained if row["feature_price"] is not None)
    cuts = [prices[math.ceil(len(prices) * share) - 1] for share in (0.25, 0.5, 0.75)]
    test = rows(data, "test")
    encoded = encoder.encode(test)
    bucket = encoded[IDS][:, [one.name for one in encoder.single].index("price")]
    for number, row in enumerate(test.to_pylist()):
        age, price = row["feature_age"], row["feature_price"]
        wanted = [0.0, 1.0] if age is None else [(log(age) - mean) / deviation, 0.0]
        assert encoded[NUMBERS][number] == pytest.approx(wanted, abs=1e-5)
        assert bucket[number] == (-1 if price is None else 1 + sum(price >= cut for cut in cuts))
    assert set(bucket.tolist()) == {-1, 1, 2, 3, 4}


def test_a_missing_number_counts_as_the_mean(data: Path) -> None:
    config = FeaturesConfig(use={"age": FeatureUse()})
    encoder = fit_encoder(resolve_features(config, open_dataset(data)), files(data, *TRAINED))
    ages = [row["feature_age"] for row in rows(data, *TRAINED).to_pylist()]
    table = pa.table({"feature_age": pa.array([None, 30.0])})
    encoded = encoder.encode(table)[NUMBERS]
    mean = np.mean([age for age in ages if age is not None])
    assert encoded.tolist() == [[pytest.approx(mean), 1.0], [30.0, 0.0]]


def test_crosses(data: Path, encoder: FeatureEncoder) -> None:
    def combination(row: dict) -> tuple:
        return row["feature_city"], row["feature_author"], row["scenario_id"]

    counts = Counter(map(combination, rows(data, *TRAINED).to_pylist()))
    found: dict[tuple, int] = {}
    test = rows(data, "test")
    column = encoder.encode(test)[IDS][
        :, [one.name for one in encoder.single].index("place_by_author")
    ]
    for row, number in zip(test.to_pylist(), column.tolist(), strict=True):
        parts = combination(row)
        if None in parts:
            assert number == -1
        else:
            assert (number > 0) == (counts[parts] >= 3)
            if number > 0:
                assert found.setdefault(parts, number) == number
    assert len(set(found.values())) == len(found) > 20
    one = combine_ids([pa.array([1, 2]), pa.array([2, 1])]).to_pylist()
    assert one[0] != one[1]


def test_later_events_do_not_reach_the_encoder(
    data: Path, encoder: FeatureEncoder, tmp_path: Path
) -> None:
    table = rows(data, "test")
    changed = table.set_column(
        table.schema.get_field_index("feature_age"),
        "feature_age",
        pa.array(np.full(len(table), 1e6)),
    )
    features = resolve_features(FeaturesConfig(use=USE), open_dataset(data))
    again = fit_encoder(features, files(data, *TRAINED))
    assert again.fingerprint == encoder.fingerprint
    pq.write_table(changed, tmp_path / "changed.parquet")
    other = fit_encoder(features, [*files(data, *TRAINED), tmp_path / "changed.parquet"])
    assert other.fingerprint != encoder.fingerprint


# ---------------------------------------------------------------- sequences


@pytest.fixture(scope="module")
def items(data: Path) -> Vocabulary:
    seen = rows(data, *TRAINED)["item_id"].unique().to_pylist()
    return Vocabulary(pa.array(sorted(seen)[1:], pa.int64()))  # one is unknown


@pytest.fixture(scope="module")
def with_sequences(data: Path) -> FeatureEncoder:
    use = USE | {"clicks": FeatureUse(), "seen": FeatureUse(pooling="sum", fields=["gap", "city"])}
    features = resolve_features(FeaturesConfig(use=use), open_dataset(data))
    return fit_encoder(features, files(data, *TRAINED))


def test_steps_read_the_tables_of_items_features_and_gaps(
    data: Path, with_sequences: FeatureEncoder, items: Vocabulary
) -> None:
    test = rows(data, "test")
    encoded = with_sequences.encode(test, items=items)
    tables = {
        "item": dict(zip(items.keys.to_pylist(), range(1, 99), strict=False)),
        **{
            name: dict(
                zip(
                    with_sequences.by_table[f"feature_{name}"].vocabulary.keys.to_pylist(),
                    range(1, 99),
                    strict=False,
                )
            )
            for name in ("author", "city")
        },
    }
    assert "sequence_seen_item" not in encoded  # left out by `fields`
    missing = set()
    for column in ("clicks_item", "clicks_author", "clicks_gap", "seen_city", "seen_gap"):
        steps, field = encoded[f"sequence_{column}"], column.split("_")[1]
        begin = 0
        for number, values in enumerate(test[f"sequence_{column}"].to_pylist()):
            end = begin + steps.lengths[number]
            if field == "gap":
                wanted = [1 + min(gap.bit_length(), 32) for gap in values]
            else:
                wanted = [tables[field].get(value, 0) for value in values]
            assert steps.values[begin:end].tolist() == wanted
            if field in ("author", "city"):
                there = [float(value is not None) for value in values]
                assert steps.weights[begin:end].tolist() == there
                missing |= set(there)
            begin = end
        assert begin == len(steps.values) > 100
    assert missing == {0.0, 1.0}
    assert gap_rows(np.array([0, 1, 2, 3, 4, 2**40])).tolist() == [1, 2, 3, 3, 4, GAP_ROWS - 1]
    with pytest.raises(ValueError, match="'sequence_clicks_item' holds items"):
        with_sequences.encode(test)


def test_a_sequence_that_no_encoder_takes_is_named(
    data: Path, with_sequences: FeatureEncoder, items: Vocabulary, tmp_path: Path
) -> None:
    table = rows(data, "test")
    for column, change in (
        ("sequence_clicks_item", lambda steps: [None, *steps[1:]]),
        ("sequence_clicks_author", lambda steps: steps[1:]),
        ("sequence_clicks_gap", lambda steps: [-1, *steps[1:]]),
    ):
        values = table[column].to_pylist()
        values[9] = change(values[9])
        place, field = table.schema.get_field_index(column), table.schema.field(column)
        changed = table.set_column(place, field, pa.array(values, field.type))
        with pytest.raises(InputError, match=column):
            with_sequences.encode(changed, items=items)


PROCESS = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
from embeddings.ids import Vocabulary
from trainer.features.encoder import FeatureEncoder
encoder = FeatureEncoder.load(Path(sys.argv[1]))
items = Vocabulary.load(Path(sys.argv[1], "ids", "item.parquet"))
table = pq.read_table(sys.argv[2], columns=encoder.columns)
size, made = int(sys.argv[3]), {}
for start in range(0, len(table), size):
    for name, part in encoder.encode(table.slice(start, size), items=items).items():
        ragged = name not in ("feature_ids", "feature_numbers")
        arrays = {"": part} if not ragged else vars(part)
        for field, values in arrays.items():
            if values is not None:
                made.setdefault(name + field, []).extend(values.tolist())
assert "torch" not in sys.modules
print(json.dumps([encoder.fingerprint, made]))
"""


@pytest.mark.parametrize("size", [1, 7, 65_536])
def test_a_fresh_process_encodes_raw_rows_alike(
    data: Path, with_sequences: FeatureEncoder, items: Vocabulary, tmp_path: Path, size: int
) -> None:
    encoder = with_sequences
    encoder.save(tmp_path)
    items.save(tmp_path / "ids" / "item.parquet")
    file = files(data, "test")[0]
    words = [sys.executable, "-c", PROCESS, str(tmp_path), str(file), str(size)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    fingerprint, made = json.loads(run.stdout)
    assert fingerprint == encoder.fingerprint == FeatureEncoder.load(tmp_path).fingerprint
    for name, part in encoder.encode(pq.read_table(file), items=items).items():
        arrays = vars(part) if isinstance(part, Ragged) else {"": part}
        for field, values in arrays.items():
            if values is not None:
                assert made[name + field] == values.tolist(), name


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("feature_age", float("nan")),
        ("feature_price", float("inf")),
        ("feature_tags", [1, None]),
        ("weights_tags", [0.5, float("nan")]),
    ],
)
def test_what_no_encoder_takes_is_named_by_file_and_row(
    data: Path, encoder: FeatureEncoder, tmp_path: Path, column: str, value: object
) -> None:
    table = rows(data, "train")
    values = table[column].to_pylist()
    fits = [isinstance(old, float) or (old is not None and len(old) == 2) for old in values]
    row = fits.index(True, 5)
    values[row] = value
    place, kind = table.schema.get_field_index(column), table.schema.field(column)
    table = table.set_column(place, kind, pa.array(values, kind.type))
    pq.write_table(table, tmp_path / "part.parquet")
    says = rf"part\.parquet: column '{column}', row {row + 1} "
    with pytest.raises(InputError, match=says):
        encoder.encode(table, tmp_path / "part.parquet")
    with pytest.raises(InputError, match=column):  # a server has no file
        encoder.encode(table.slice(row, 1))


def test_a_damaged_encoder_and_one_of_other_features_are_refused(
    data: Path, encoder: FeatureEncoder, tmp_path: Path
) -> None:
    encoder.save(tmp_path)
    features = resolve_features(FeaturesConfig(use=USE), open_dataset(data))
    encoder.check(features, tmp_path)
    with pytest.raises(InputError, match=r"words is not configured"):
        encoder.check(features[:-1], tmp_path)
    other = USE | {"age": FeatureUse(transform="log")}
    with pytest.raises(InputError, match=r"features\.use\.age: is encoded with .*'scale'"):
        encoder.check(resolve_features(FeaturesConfig(use=other), open_dataset(data)), tmp_path)
    (tmp_path / "ids" / "city.parquet").unlink()
    with pytest.raises(InputError, match=r"missing or damaged .*city\.parquet"):
        FeatureEncoder.load(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match=r"features\.json: .*missing or damaged"):
        FeatureEncoder.load(tmp_path)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (
            {"agee": {}},
            r"features\.use\.agee: the dataset has no feature 'agee' \(there: age, city",
        ),
        ({"age": {"dim": 8}}, r"age\.dim: would be ignored by kind number"),
        ({"age": {"buckets": 4, "scale": "standard"}}, r"age\.scale: .* a number in buckets"),
        ({"city": {"pooling": "mean"}}, r"city\.pooling: would be ignored by kind id"),
        ({"city": {"ids": "hash"}}, "rows belongs to ids = hash"),
        (
            {"city": {"ids": "hash", "rows": 9, "min_count": 2}},
            "min_count: belongs to a vocabulary",
        ),
        ({"x": {"cross": ["city", "tags"]}}, r"x\.cross: 'tags' is not a feature of kind id"),
        ({"x": {"cross": ["city", "city"]}}, "names a feature twice"),
        ({"city": {"cross": ["city", "user"]}}, "call the cross otherwise"),
        ({"clicks": {}}, r"field author reads .* add features\.use\.author, or leave it out"),
        ({"clicks": {"fields": ["city"]}}, r"clicks\.fields: 'city' is no field of the sequence"),
        ({"clicks": {"fields": ["gap"]}}, "a gap alone has no target: use sum or mean"),
        ({"clicks": {"fields": ["item", "item"]}}, "names a field twice"),
        ({"clicks": {"fields": ["item"], "dim": 8}}, r"clicks\.dim: is the width of the field gap"),
        ({"clicks": {"ids": "vocabulary"}}, r"clicks\.ids: would be ignored by a sequence"),
        ({"tags": {"pooling": "attention"}}, "attention is of sequences; use sum or mean"),
        ({"tags": {"fields": ["item"]}}, r"tags\.fields: would be ignored by kind ids"),
        ({"seen": {"cross": ["city", "user"]}}, "call the cross otherwise"),
    ],
)
def test_options_that_make_no_sense_are_refused(data: Path, use: dict, says: str) -> None:
    config = FeaturesConfig(use={name: FeatureUse(**one) for name, one in use.items()})
    with pytest.raises(InputError, match=says):
        resolve_features(config, open_dataset(data))


def test_ragged_rows_are_sliced_taken_and_joined() -> None:
    lists = [[1, 2], [], [3], [4, 5, 6], []]
    lengths = np.array([len(one) for one in lists])
    values = np.concatenate([np.array(one, dtype=np.int64) for one in lists])
    rows = Ragged(values, lengths, values.astype(np.float32) / 2)

    def content(ragged: Ragged) -> list[list[int]]:
        assert ragged.weights.tolist() == (ragged.values / 2).tolist()
        return [part.tolist() for part in np.split(ragged.values, np.cumsum(ragged.lengths)[:-1])]

    assert content(rows[1:4]) == lists[1:4]
    assert content(rows[np.array([3, 0, 4, 3])]) == [lists[n] for n in (3, 0, 4, 3)]
    assert content(Ragged.concatenate([rows[3:], rows[:3]])) == lists[3:] + lists[:3]
    assert len(rows[5:].values) == 0
    assert rows.nbytes == 8 * 6 + 8 * 5 + 4 * 6


def test_the_order_of_the_configuration_decides_nothing(
    data: Path, encoder: FeatureEncoder
) -> None:
    backwards = FeaturesConfig(use=dict(reversed(list(USE.items()))))
    other = fit_encoder(resolve_features(backwards, open_dataset(data)), files(data, *TRAINED))
    assert other.fingerprint == encoder.fingerprint
    assert [one.name for one in other.encodings] == [one.name for one in encoder.encodings]
