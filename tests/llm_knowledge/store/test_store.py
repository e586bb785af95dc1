import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.store.inspect import inspect_store
from llm_knowledge.store.manifest import Cutoff, file_checksum, read_manifest
from llm_knowledge.store.neighbours import nearest
from llm_knowledge.store.reader import NO_CUTOFF, KnowledgeStore, verify
from llm_knowledge.store.writer import shuffled_store, write_manifest, write_part, write_store
from tests.helpers.knowledge_data import manifest


def make(path, rows=10, rows_per_part=4, keys=None, **update):
    keys = list(range(0, rows * 10, 10)) if keys is None else keys
    vectors = np.random.default_rng(0).normal(size=(len(keys), 8)).astype(np.float32)
    prompts = [f"prompt {key}" for key in keys]
    cutoffs = [None if i == 0 else 100 + i for i in range(len(keys))]
    write_store(path, manifest(**update), keys, vectors, prompts, None, cutoffs, rows_per_part)
    return vectors


def repoint(path, index, table):
    """Replace a part and make the manifest agree, as a faulty writer would have left it."""
    file = path / f"part-{index:05d}.parquet"
    pq.write_table(table, file, use_dictionary=False)
    found = read_manifest(path)
    parts = list(found.parts)
    parts[index] = parts[index].model_copy(
        update={
            "checksum": file_checksum(file),
            "rows": len(table),
            "key_min": table["key"][0].as_py(),
            "key_max": table["key"][-1].as_py(),
        }
    )
    rows = sum(part.rows for part in parts)
    write_manifest(path, found.model_copy(update={"parts": parts, "rows": rows}))


def replaced(table, name, values):
    index = table.schema.get_field_index(name)
    return table.set_column(
        index, table.schema.field(index), pa.array(values, table.schema.field(index).type)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_round_trip(tmp_path, dtype):
    vectors = make(tmp_path / "s", dtype=dtype)
    store = KnowledgeStore.open(tmp_path / "s")
    verify(tmp_path / "s")
    assert len(store.manifest.parts) == 3
    assert store.keys().dtype == np.int64
    assert store.keys().tolist() == list(range(0, 100, 10))
    assert store.cutoffs().tolist() == [NO_CUTOFF] + [100 + i for i in range(1, 10)]
    tolerance = {"float16": 2e-3, "float32": 0, "int8": 0.02}[dtype]
    read = store.read_vectors(3, 9)
    assert read.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_allclose(read, vectors[3:9], atol=tolerance)
    np.testing.assert_allclose(store.read_vectors(0, 10), vectors, atol=tolerance)
    assert store.read_vectors(5, 5).shape == (0, 8)
    assert store.row_of([90, 5, 0, -1, 10**12]).tolist() == [9, -1, 0, -1, -1]
    texts = store.read_text([7, 0, 7])
    assert texts == [
        {"prompt": "prompt 70", "answer": None},
        {"prompt": "prompt 0", "answer": None},
        {"prompt": "prompt 70", "answer": None},
    ]


def test_string_keys_are_sorted_by_bytes(tmp_path):
    keys = ["b", "Z", "é", "\U0001f600", "a", "\uff5e", ""]
    vectors = make(tmp_path / "s", keys=keys, key_type="string", dtype="float32")
    store = KnowledgeStore.open(tmp_path / "s")
    verify(tmp_path / "s")
    assert store.keys().tolist() == sorted(keys, key=lambda key: key.encode())
    rows = store.row_of(keys)
    np.testing.assert_array_equal(store.read_vectors(0, 7)[rows], vectors)
    assert store.row_of(["nobody"]).tolist() == [-1]
    with pytest.raises(InputError, match="keys are strings"):
        store.row_of([3])


def test_row_of_refuses_strings_in_an_int_store(tmp_path):
    make(tmp_path / "s")
    with pytest.raises(InputError, match="keys are int64"):
        KnowledgeStore.open(tmp_path / "s").row_of(["7"])


def test_narrow_read_touches_only_its_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_knowledge.store.writer.ROW_GROUP_BYTES", 8 * 2 * 10)
    vectors = make(tmp_path / "s", rows=100, rows_per_part=50, dtype="float16")
    store = KnowledgeStore.open(tmp_path / "s")
    asked = []
    read = store._read
    monkeypatch.setattr(store, "_read", lambda *a: asked.append(a[2]) or read(*a))
    np.testing.assert_allclose(store.read_vectors(23, 27), vectors[23:27], atol=2e-3)
    assert asked == [[2]]
    np.testing.assert_allclose(store.read_vectors(45, 65), vectors[45:65], atol=2e-3)
    assert asked[1:] == [[4], [0], [1]]


def test_narrow_read_takes_the_bytes_of_its_row_groups_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llm_knowledge.store.writer.ROW_GROUP_BYTES", 16_384
    )  # 1,024 rows of 16 bytes
    vectors = make(tmp_path / "s", rows=8_192, rows_per_part=4_096, dtype="float16")
    taken = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            taken.append(len(data))
            return data

    monkeypatch.setattr(
        "llm_knowledge.store.reader.open_part",
        lambda file: pq.ParquetFile(Counting(file), pre_buffer=False),
    )
    store = KnowledgeStore.open(tmp_path / "s")
    for index in range(2):
        store._handle(index)  # footers
    for start, stop, groups in ((1_100, 1_101, 1), (1_000, 1_100, 2), (3_000, 5_000, 3)):
        taken.clear()
        np.testing.assert_allclose(store.read_vectors(start, stop), vectors[start:stop], atol=2e-3)
        column = store._handle(0).metadata.row_group(0).column(1)
        assert column.path_in_schema == "vector"
        assert 0 < sum(taken) <= 1.1 * groups * column.total_compressed_size
    assert 10 * sum(taken) < 8 * (tmp_path / "s" / "part-00000.parquet").stat().st_size


EDITS = {
    "another model": {"model": {"name": "another"}},
    "another template": {"template": {"hash": "1"}},
    "another pooling": {"pooling": "last"},
    "another layer": {"layer": -2},
    "another level": {"level": "item"},
    "a smaller dim": {"dim": 4},
    "another dtype": {"dtype": "float32"},
    "keys as text": {"key_type": "string"},
    "normalized": {"normalized": True},
    "a note": {"note": "shuffled control, seed 0"},
    "parents": {"parents": ["f"]},
    "another input": {"input_fingerprint": "g"},
    "more rows": {"rows": 12},
    "no parts": {"rows": 0, "parts": []},
    "fewer parts": {"parts": slice(0, 2)},
    "parts turned round": {"parts": slice(None, None, -1)},
    "a cut-off for all": {"cutoff": {"kind": "global", "value": 5}},
    "an unknown field": {"comment": "looks better"},
    "a word for a number": {"rows": "ten"},
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_finds_what_was_edited_by_hand(tmp_path, edit):
    make(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    about = json.loads(file.read_text())
    for name, value in EDITS[edit].items():
        if isinstance(value, slice):
            about[name] = about[name][value]
        else:
            about[name] = {**about[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"manifest\.json: |part-0000\d\.parquet: "):
        verify(tmp_path / "s")


@pytest.mark.parametrize("field", ["file", "rows", "key_min", "key_max", "checksum"])
def test_verify_finds_a_part_edited_by_hand(tmp_path, field):
    make(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    about = json.loads(file.read_text())
    changed = {
        "file": "part-00002.parquet",
        "rows": 5,
        "key_min": 41,
        "key_max": 71,
        "checksum": "x",
    }
    about["parts"][1][field] = changed[field]
    file.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"manifest\.json: |part-0000\d\.parquet: "):
        verify(tmp_path / "s")


def test_parts_of_two_stores_do_not_mix(tmp_path):
    make(tmp_path / "s")
    make(tmp_path / "t", input_fingerprint="of another log")
    (tmp_path / "s" / "part-00001.parquet").write_bytes(
        (tmp_path / "t" / "part-00001.parquet").read_bytes()
    )
    with pytest.raises(InputError, match=r"part-00001\.parquet: .*checksum"):
        verify(tmp_path / "s")
    with pytest.raises(InputError, match=r"part-00001\.parquet: row 0: made by another model"):
        KnowledgeStore.open(tmp_path / "s")


def test_fingerprint_follows_the_vectors_not_the_versions(tmp_path):
    (
        make(tmp_path / "a"),
        make(tmp_path / "b", versions={"torch": "0"}),
        make(tmp_path / "c", rows=9),
    )
    a, b, c = (KnowledgeStore.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_open_refuses_absent_and_incomplete(tmp_path):
    with pytest.raises(InputError, match="not found"):
        KnowledgeStore.open(tmp_path / "none")
    (tmp_path / "s").mkdir()
    write_manifest(tmp_path / "s", manifest())
    with pytest.raises(InputError, match="incomplete"):
        KnowledgeStore.open(tmp_path / "s")
    assert len(KnowledgeStore.open(tmp_path / "s", allow_incomplete=True)) == 0
    (tmp_path / "s" / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(InputError, match="level: Field required"):
        KnowledgeStore.open(tmp_path / "s")


def test_a_part_outside_the_directory_is_refused(tmp_path):
    make(tmp_path / "s")
    found = read_manifest(tmp_path / "s")
    parts = [found.parts[0].model_copy(update={"file": "../x.parquet"}), *found.parts[1:]]
    write_manifest(tmp_path / "s", found.model_copy(update={"parts": parts}))
    with pytest.raises(InputError, match="is not a file name"):
        KnowledgeStore.open(tmp_path / "s")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_writer_refuses_what_float16_cannot_hold(tmp_path, value):
    vectors = np.zeros((3, 8))
    vectors[1, 4] = value
    with pytest.raises(InputError, match=r"part-00000.parquet: row 1: .*NaN or Inf"):
        write_part(tmp_path, 0, manifest(), [1, 2, 3], vectors, ["", "", ""])
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="expected"):
        write_part(tmp_path, 0, manifest(), [1, 2, 3], np.zeros((3, 7)), ["", "", ""])


def test_write_store_never_overwrites(tmp_path):
    make(tmp_path / "s")
    with pytest.raises(InputError, match="not empty"):
        make(tmp_path / "s", rows=3)
    assert len(KnowledgeStore.open(tmp_path / "s")) == 10


def test_verify_missing_part(tmp_path):
    make(tmp_path / "s")
    (tmp_path / "s" / "part-00001.parquet").unlink()
    for check in (verify, KnowledgeStore.open):
        with pytest.raises(InputError, match=r"part-00001.parquet: the part is missing"):
            check(tmp_path / "s")


def test_verify_finds_every_flipped_byte(tmp_path):
    make(tmp_path / "s")
    file = tmp_path / "s" / "part-00002.parquet"
    whole = file.read_bytes()
    for at in (0, 8, len(whole) // 2, len(whole) - 1):
        broken = bytearray(whole)
        broken[at] ^= 1
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"part-00002.parquet: its bytes changed"):
            verify(tmp_path / "s")
    file.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"part-00002.parquet: not a readable Parquet"):
        KnowledgeStore.open(tmp_path / "s")
    file.write_bytes(whole)
    verify(tmp_path / "s")


def test_verify_duplicates_and_order(tmp_path):
    make(tmp_path / "s")
    table = pq.read_table(tmp_path / "s" / "part-00001.parquet")
    repoint(tmp_path / "s", 1, replaced(table, "key", [40, 50, 50, 70]))
    with pytest.raises(InputError, match=r"part-00001.parquet: row 2: key 50 is a duplicate"):
        verify(tmp_path / "s")
    repoint(tmp_path / "s", 1, replaced(table, "key", [40, 60, 50, 70]))
    with pytest.raises(InputError, match=r"part-00001.parquet: row 2: key 50 is out of order"):
        verify(tmp_path / "s")
    repoint(tmp_path / "s", 1, replaced(table, "key", [30, 50, 60, 70]))
    with pytest.raises(InputError, match=r"part-00001.parquet: row 0: key 30 is a duplicate"):
        verify(tmp_path / "s")


def test_verify_not_finite_and_not_normalized(tmp_path):
    make(tmp_path / "s", dtype="float32")
    table = pq.read_table(tmp_path / "s" / "part-00000.parquet")
    values = np.zeros((4, 8), np.float32)
    values[3, 1] = np.nan
    repoint(tmp_path / "s", 0, replaced(table, "vector", [row.tobytes() for row in values]))
    with pytest.raises(InputError, match=r"part-00000.parquet: row 3: the vector has NaN or Inf"):
        verify(tmp_path / "s")
    make(tmp_path / "n", normalized=True)
    with pytest.raises(InputError, match=r"part-00000.parquet: row 0: the vector has length"):
        verify(tmp_path / "n")


def test_verify_wrong_dimension_rows_and_other_model(tmp_path):
    make(tmp_path / "s")
    other = manifest(model=manifest().model.model_copy(update={"name": "another"}))
    for index, made_by, dim, message in (
        (1, manifest(dim=6), 6, "the manifest says 16 bytes, dim 8"),
        (1, other, 8, "row 0: made by another model"),
    ):
        write_part(tmp_path / "s", index, made_by, [40, 50, 60, 70], np.ones((4, dim)), [""] * 4)
        repoint(tmp_path / "s", index, pq.read_table(tmp_path / "s" / f"part-{index:05d}.parquet"))
        for check in (verify, KnowledgeStore.open):
            with pytest.raises(InputError, match=f"part-00001.parquet: .*{message}"):
                check(tmp_path / "s")


def test_verify_row_counts_and_cutoffs(tmp_path):
    make(tmp_path / "s")
    found = read_manifest(tmp_path / "s")
    write_manifest(tmp_path / "s", found.model_copy(update={"rows": 11}))
    with pytest.raises(InputError, match="rows: 11, but the parts have 10"):
        verify(tmp_path / "s")
    write_manifest(tmp_path / "s", found.model_copy(update={"cutoff": Cutoff(kind="none")}))
    with pytest.raises(InputError, match=r"part-00000.parquet: row 1: cut-off 101"):
        verify(tmp_path / "s")


@pytest.mark.parametrize("control", ["random", "constant"])
def test_controls_keep_keys_and_cutoffs_and_nothing_else(tmp_path, control):
    make(tmp_path / "s")
    shuffled_store(tmp_path / "s", tmp_path / "x", seed=1, control=control)
    verify(tmp_path / "x")
    source, found = KnowledgeStore.open(tmp_path / "s"), KnowledgeStore.open(tmp_path / "x")
    assert list(found.keys()) == list(source.keys())
    assert list(found.cutoffs()) == list(source.cutoffs())
    vectors = found.read_vectors(0, found.manifest.rows)
    assert (np.unique(vectors, axis=0).shape[0] == 1) == (control == "constant")
    assert not np.isin(vectors, source.read_vectors(0, found.manifest.rows)).all()
    assert found.read_text(np.array([0]))[0]["prompt"] == ""
    assert found.fingerprint != source.fingerprint


def test_shuffled_store_moves_every_vector(tmp_path):
    make(tmp_path / "s", rows=50, rows_per_part=20)
    shuffled_store(tmp_path / "s", tmp_path / "x", seed=1)
    verify(tmp_path / "x")
    a, b = KnowledgeStore.open(tmp_path / "s"), KnowledgeStore.open(tmp_path / "x")
    np.testing.assert_array_equal(a.keys(), b.keys())
    np.testing.assert_array_equal(a.cutoffs(), b.cutoffs())
    one, two = a.read_vectors(0, 50), b.read_vectors(0, 50)
    assert not (one == two).all(axis=1).any()
    assert sorted(map(bytes, one)) == sorted(map(bytes, two))
    assert b.manifest.parents == [a.fingerprint]
    assert "shuffled control" in b.manifest.note
    assert a.fingerprint != b.fingerprint
    shuffled_store(tmp_path / "s", tmp_path / "y", seed=1)
    assert KnowledgeStore.open(tmp_path / "y").fingerprint == b.fingerprint


def test_inspect_shows_prompt_and_nearest(tmp_path):
    vectors = make(tmp_path / "s")
    out = io.StringIO()
    inspect_store(tmp_path / "s", "30", out)
    text = out.getvalue()
    assert "10 in 3 parts" in text
    assert "prompt 30" in text
    assert "key 30, row 3" in text
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [row for row in np.argsort(-(unit @ unit[3])) if row != 3][:5]
    store = KnowledgeStore.open(tmp_path / "s")
    assert [row for row, _ in nearest(store, [3])[0]] == expected
    with pytest.raises(InputError, match="has no key '31'"):
        inspect_store(tmp_path / "s", "31", out)
    with pytest.raises(InputError, match="keys are integers"):
        inspect_store(tmp_path / "s", "x", out)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([40, 50, 50, 70], "row 2: key 50 is a duplicate"),
        ([40, 60, 50, 70], "row 2: key 50 is out of order"),
        ([30, 50, 60, 70], "row 0: key 30 is a duplicate"),
        ([20, 50, 60, 70], "row 0: key 20 is out of order"),
    ],
)
def test_keys_that_could_not_be_found_are_refused_when_read(tmp_path, keys, problem):
    make(tmp_path / "s")
    table = pq.read_table(tmp_path / "s" / "part-00001.parquet")
    repoint(tmp_path / "s", 1, replaced(table, "key", keys))
    with pytest.raises(InputError, match=f"part-00001.parquet: {problem}"):
        KnowledgeStore.open(tmp_path / "s").keys()


@pytest.mark.parametrize("column", ["key", "prompt", "answer", "cutoff"])
def test_a_column_of_another_type_is_refused_when_a_store_is_opened(tmp_path, column):
    make(tmp_path / "s")
    table = pq.read_table(tmp_path / "s" / "part-00001.parquet")
    other = pa.array([True] * len(table))
    place = table.schema.get_field_index(column)
    repoint(tmp_path / "s", 1, table.set_column(place, column, other))
    with pytest.raises(
        InputError, match=rf"part-00001\.parquet: column '{column}' is bool, must be"
    ):
        KnowledgeStore.open(tmp_path / "s")


def test_a_footer_that_is_no_text_is_refused(tmp_path):
    make(tmp_path / "s")
    file = tmp_path / "s" / "part-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({b"llm_knowledge.job": b"\xe5"}), file)
    with pytest.raises(InputError, match=r"part-00001\.parquet: row 0: made by another model"):
        KnowledgeStore.open(tmp_path / "s")
