"""The event stream: every row once, even shares, the point-in-time join."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.ids import SortedKeys, Vocabulary
from llm_knowledge.errors import InputError
from llm_knowledge.store.reader import KnowledgeStore
from tests.helpers.training_data import make_inputs
from trainer.data.dataset import split_files
from trainer.data.loading.batch import Batch
from trainer.data.loading.loader import EventStream, StreamRange
from trainer.data.loading.row_encoder import KnowledgeJoin, RowEncoder
from trainer.data.loading.row_groups import RowGroups

USERS, ITEMS = 40, 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("loader"), users=USERS)


def make_encoder(stores: Path, users: pa.Array = None, items: pa.Array = None) -> RowEncoder:
    return RowEncoder(
        users=Vocabulary(pa.array(range(USERS), pa.int64()) if users is None else users),
        items=Vocabulary(pa.array(range(ITEMS), pa.int64()) if items is None else items),
        scenarios=SortedKeys(pa.array(["food", "kitchen"])),
        scenario_order=np.array([0, 1]),
        history_length=20,
        joins={
            level: KnowledgeJoin(KnowledgeStore.open(stores / level))
            for level in ("user", "item", "scenario")
        },
    )


def streams(
    inputs: tuple[Path, Path], world: int, batch: int, splits: list[str], **options: int
) -> list:
    data, stores = inputs
    files = [file for split in splits for file in split_files(data, split)]
    encoder = make_encoder(stores)
    return [
        EventStream(files, encoder, batch * world, rank, world, **options) for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("buffer", [0, 50, 10_000])
def test_every_row_once_and_even_steps(inputs: tuple[Path, Path], world: int, buffer: int) -> None:
    ranks = streams(inputs, world, 17, ["profile", "train"], shuffle_buffer=buffer, seed=5)
    table = pq.read_table(inputs[0] / "profile/part-00000.parquet")
    table = pa.concat_tables([table, pq.read_table(inputs[0] / "train/part-00000.parquet")])
    expected = sorted(
        zip(
            table["user_id"].to_pylist(),
            table["item_id"].to_pylist(),
            table["label"].to_pylist(),
            strict=True,
        )
    )
    for epoch in (0, 1):
        seen = []
        counts = []
        for stream in ranks:
            batches = list(stream.batches(epoch))
            counts.append(len(batches))
            for batch in batches:
                kept = int(batch.weight.sum())
                users = batch.ids["user"].values() - 1
                items = batch.ids["item"].values() - 1
                assert len(users) == len(items) == kept
                assert len(batch.label) == 17
                seen += list(
                    zip(
                        users.tolist(),
                        items.tolist(),
                        batch.label[:kept].int().tolist(),
                        strict=True,
                    )
                )
        assert sorted(seen) == expected
        assert counts == [ranks[0].steps] * world


@pytest.mark.parametrize("world", [2, 3, 6])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(
    inputs: tuple[Path, Path], world: int
) -> None:
    def global_batches(ranks: int) -> list[list[tuple[int, int]]]:
        options = {"streams": 6, "shuffle_buffer": 120, "seed": 3}
        streams_ = streams(inputs, ranks, 36 // ranks, ["profile", "train"], **options)
        steps = zip(*(stream.batches(1) for stream in streams_), strict=True)
        return [
            sorted(
                pair
                for batch in step
                for pair in zip(
                    batch.ids["user"].values().tolist(),
                    batch.ids["item"].values().tolist(),
                    strict=True,
                )
            )
            for step in steps
        ]

    assert global_batches(world) == global_batches(1)


@pytest.mark.parametrize(
    ("batch", "count", "world", "message"),
    [(64, 8, 3, "8 streams cannot be served by 3 ranks"), (60, 8, 2, "60 cannot be split over 8")],
)
def test_shares_that_do_not_divide(batch: int, count: int, world: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EventStream([], None, batch, 0, world, streams=count)  # type: ignore[arg-type]


def test_shuffle_repeats_by_seed_and_differs_by_epoch(inputs: tuple[Path, Path]) -> None:
    def users(seed: int, epoch: int) -> list[int]:
        (stream,) = streams(inputs, 1, 64, ["train"], shuffle_buffer=1000, seed=seed)
        return [u for batch in stream.batches(epoch) for u in batch.ids["user"].values().tolist()]

    assert users(1, 0) == users(1, 0)
    assert users(1, 0) != users(1, 1)
    assert users(1, 0) != users(2, 0)


def test_skipping_continues_where_the_epoch_was_left(inputs: tuple[Path, Path]) -> None:
    (stream,) = streams(inputs, 1, 16, ["train"], shuffle_buffer=100, seed=1)
    whole = [batch.ids.values().tolist() for batch in stream.batches(1)]
    assert [batch.ids.values().tolist() for batch in stream.batches(1, skip=7)] == whole[7:]


def flat(batch: Batch) -> list[list[float]]:
    """Everything of a batch, as lists."""
    jagged = (batch.ids, batch.knowledge)
    tensors = [one for keyed in jagged for one in (keyed.values(), keyed.lengths())]
    tensors += [batch.scenario, batch.scenario_knowledge, batch.label, batch.weight]
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_do_not_depend_on_the_threads(inputs: tuple[Path, Path], workers: int) -> None:
    options = {"streams": 4, "shuffle_buffer": 60, "seed": 2}
    (alone,) = streams(inputs, 1, 32, ["profile", "train"], **options)
    (ahead,) = streams(inputs, 1, 32, ["profile", "train"], workers=workers, prefetch=2, **options)
    stop = 2 * alone.steps
    with alone.feed(0, stop) as one:
        wanted = [flat(batch) for batch in one]
    assert len(wanted) == stop
    for start in (0, 7, alone.steps, alone.steps + 3):  # a position is the number of a step
        with ahead.feed(start, stop) as other:
            assert [flat(batch) for batch in other] == wanted[start:]


def test_going_on_in_the_middle_reads_nothing_before(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(inputs[0] / "train/part-00000.parquet")
    pq.write_table(table, tmp_path / "small-groups.parquet", row_group_size=10)
    stream = EventStream(
        [tmp_path / "small-groups.parquet"], make_encoder(inputs[1]), 10, 0, 1, shuffle_buffer=20
    )
    read: list[int] = []
    whole = RowGroups.read
    monkeypatch.setattr(
        RowGroups, "read", lambda self, columns, n: read.append(n) or whole(self, columns, n)
    )
    assert len(list(stream.batches(0, skip=stream.steps - 2))) == 2
    assert len(read) <= 4 < len(table) // 10


def test_hundreds_of_files_are_opened_once_each(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(inputs[0] / "train/part-00000.parquet")
    files = [tmp_path / f"part-{number:05d}.parquet" for number in range(500)]
    for number, file in enumerate(files):
        pq.write_table(table.slice(number % 300, number % 2), file)  # every other one is empty
    opened: list[Path] = []
    footer = pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda file: opened.append(file) or footer(file))
    stream = EventStream(files, make_encoder(inputs[1]), 16, 0, 1, streams=4, shuffle_buffer=40)
    assert opened == files
    handles: list[object] = []
    parquet_file = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda *a, **k: handles.append(a) or parquet_file(*a, **k)
    )
    assert sum(float(batch.weight.sum()) for batch in stream.batches()) == 250
    assert len(handles) <= 250 + 3  # a group that two streams share is read by both


def test_string_ids_and_lists_of_strings(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path, users=5, id_type="string")
    table = pq.read_table(data / "train/part-00000.parquet")
    ids = {name: table[name].combine_chunks().unique().sort() for name in ("user_id", "item_id")}
    histories = pa.array([ids["item_id"].to_pylist()[:2]] * len(table), pa.list_(pa.string()))
    place = table.schema.get_field_index("history")
    file = tmp_path / "events.parquet"
    pq.write_table(table.set_column(place, "history", histories), file, row_group_size=7)
    encoder = make_encoder(stores, ids["user_id"], ids["item_id"])
    (batch,) = EventStream([file], encoder, len(table), 0, 1).batches()
    names = [ids["user_id"][row - 1].as_py() for row in batch.ids["user"].values().tolist()]
    assert names == table["user_id"].to_pylist()
    assert batch.ids["history"].values().tolist() == [1, 2] * len(table)


def test_the_host_knows_how_many_ids_each_feature_has(inputs: tuple[Path, Path]) -> None:
    """Else a model on a GPU would stop and ask it, in every step."""
    (stream,) = streams(inputs, 1, 64, ["train"])
    batch = next(iter(stream.batches(0)))
    for copied in (batch, batch.to(torch.device("cpu"))):
        for ids in (copied.ids, copied.knowledge, copied.weighted):
            counts = ids.length_per_key_or_none()
            assert counts is not None
            lengths = ids.lengths().view(len(counts), -1) if counts else torch.zeros(0, 1)
            assert counts == lengths.sum(1).tolist()


def test_null_inside_a_list(inputs: tuple[Path, Path]) -> None:
    table = pq.read_table(inputs[0] / "train/part-00000.parquet").slice(0, 2)
    column = pa.array([[1, None], []], type=pa.list_(pa.int64()))
    table = table.set_column(table.schema.get_field_index("history"), "history", column)
    with pytest.raises(InputError, match=r"part-7\.parquet: column 'history' has a null inside"):
        make_encoder(inputs[1]).encode(table, Path("part-7.parquet"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has vanished; put it back"),
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), "changed or replaced while"),
        (
            lambda file: pq.write_table(pq.read_table(file).slice(1), file, row_group_size=20),
            "changed or replaced while",
        ),
    ],
    ids=["deleted", "cut short", "replaced"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_that_changes_in_the_middle_of_an_epoch(
    inputs: tuple[Path, Path], tmp_path: Path, damage: object, message: str, workers: int
) -> None:
    table = pq.read_table(inputs[0] / "train/part-00000.parquet")
    files = [tmp_path / "part-00000.parquet", tmp_path / "part-00001.parquet"]
    for file in files:
        pq.write_table(table, file, row_group_size=20)
    stream = EventStream(
        files, make_encoder(inputs[1]), 16, 0, 1, 2, shuffle_buffer=32, workers=workers
    )
    with stream.feed(0, stream.steps) as feed:
        next(feed)
        damage(files[1])  # type: ignore[operator]
        left = [float(batch.weight.sum()) for batch in feed]
        assert len(left) == stream.steps - 1
        assert left[-1] == 0
        with pytest.raises(InputError, match=rf"part-00001\.parquet: .*{message}"):
            feed.check()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_small_split_is_encoded_once_and_gives_the_same_batches(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    table = pq.read_table(inputs[0] / "train/part-00000.parquet")
    files = [tmp_path / f"part-0000{number}.parquet" for number in range(2)]
    for file in files:
        pq.write_table(table, file, row_group_size=20)
    encoded: list[int] = []
    encode = RowEncoder.encode

    def counted(self: RowEncoder, rows: pa.Table, source: Path) -> dict[str, np.ndarray]:
        encoded.append(len(rows))
        return encode(self, rows, source)

    monkeypatch.setattr(RowEncoder, "encode", counted)

    def values(kept_bytes: int) -> list[list[list]]:
        monkeypatch.setattr("trainer.data.loading.loader.KEPT_BYTES", kept_bytes)
        stream = EventStream(
            files, make_encoder(inputs[1]), 16, 0, 1, 2, shuffle_buffer=32, workers=workers
        )
        encoded.clear()
        epochs = [list(stream.batches(epoch)) for epoch in range(3)]
        return [
            [[batch.ids.values().tolist(), batch.label.tolist()] for batch in epoch]
            for epoch in epochs
        ]

    read_again = values(0)
    assert len(encoded) >= 3 * 2 * len(table) // 20
    assert values(2**20) == read_again
    assert sum(encoded) == 2 * len(table)  # every row group once, whole

    stream = EventStream(files, make_encoder(inputs[1]), 16, 0, 1, 2, shuffle_buffer=32)
    list(stream.batches(0))
    files[1].unlink()
    with pytest.raises(InputError, match=r"part-00001\.parquet: has vanished"):
        list(stream.batches(1))


def test_ranks_without_rows_still_take_part(inputs: tuple[Path, Path]) -> None:
    ranks = streams(inputs, 100, 8, ["valid"])  # 80 rows for 100 ranks
    batches = [list(stream.batches()) for stream in ranks]
    assert {len(found) for found in batches} == {1}
    assert sum(float(found[0].weight.sum()) for found in batches) == 80


def test_history_keeps_the_newest_items_in_order(inputs: tuple[Path, Path]) -> None:
    encoder = make_encoder(inputs[1])
    table = pq.read_table(inputs[0] / "train/part-00000.parquet").slice(0, 3)
    histories = [[1, 2, 3], [], list(range(30))]
    column = pa.array(histories, type=pa.list_(pa.int64()))
    table = table.set_column(table.schema.get_field_index("history"), "history", column)
    batch = encoder.collate(encoder.encode(table, Path("x")), 4)
    jagged = batch.ids["history"]
    assert jagged.lengths().tolist() == [3, 0, 20, 0]
    assert (jagged.values() - 1).tolist() == [1, 2, 3, *range(10, 30)]


def test_join_is_point_in_time(inputs: tuple[Path, Path]) -> None:
    store = KnowledgeStore.open(inputs[1] / "user")
    join = KnowledgeJoin(store)
    cutoff = store.cutoffs()
    keys = pa.chunked_array([pa.array(store.keys())])
    assert (join.rows(keys, cutoff) == -1).all()  # an event at the cut-off may be in the prompt
    np.testing.assert_array_equal(join.rows(keys, cutoff + 1), np.arange(len(cutoff)))
    assert join.rows(pa.chunked_array([[10**9]]), np.array([10**12])).tolist() == [-1]


def test_profile_events_meet_no_user_knowledge_and_later_ones_do(inputs: tuple[Path, Path]) -> None:
    for split, expected in (("profile", 0), ("train", 1), ("valid", 1), ("test", 1)):
        (stream,) = streams(inputs, 1, 64, [split])
        for batch in stream.batches():
            known = batch.knowledge["user"].lengths()
            assert torch_all(known == (batch.weight * expected).long())
            assert torch_all(batch.knowledge["item"].lengths() == batch.weight.long())


def torch_all(values: object) -> bool:
    return bool(values.all())  # type: ignore[attr-defined]


def test_unknown_scenario_names_file_and_value(inputs: tuple[Path, Path]) -> None:
    encoder = make_encoder(inputs[1])
    table = pq.read_table(inputs[0] / "test/part-00000.parquet").slice(0, 2)
    table = table.set_column(2, "scenario_id", pa.array(["food", "garden"]))
    with pytest.raises(InputError, match=r"part-7\.parquet.*'garden'"):
        encoder.encode(table, Path("part-7.parquet"))


def test_a_stream_that_fits_the_buffer_is_one_chunk_wherever_it_begins() -> None:
    assert StreamRange(100, 150, 0.2).chunks(100, 10) == [100, 150]
    assert StreamRange(100, 200, 0.2).chunks(100, 10) == [100, 200]
    assert StreamRange(100, 201, 0.2).chunks(100, 10) == [100, 120, 201]


@pytest.mark.parametrize("workers", [0, 1, 2, 9])
def test_threads_are_as_many_as_asked_for_and_as_there_are_streams(
    inputs: tuple[Path, Path], workers: int
) -> None:
    """One thread collates; where there are several workers, each has streams of its own besides."""

    def readers() -> int:
        return sum(thread.name == "reads-ahead" for thread in threading.enumerate())

    options = {"streams": 4, "shuffle_buffer": 60, "workers": workers}
    (stream,) = streams(inputs, 1, 16, ["train"], **options)
    batches = stream.batches()
    next(batches)
    assert readers() == {0: 0, 1: 1, 2: 1 + 2, 9: 1 + 4}[workers]
    batches.close()
    assert readers() == 0
