"""The event stream: every row once, even shares, the point-in-time join."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.ids import SortedKeys, Vocabulary
from llm_knowledge.errors import InputError
from llm_knowledge.store import KnowledgeStore
from tests.training_data import make_inputs
from trainer.data.dataset import split_files
from trainer.data.loader import EventStream, KnowledgeJoin, RowEncoder, collate

USERS, ITEMS = 40, 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("loader"), users=USERS)


def make_encoder(stores: Path) -> RowEncoder:
    return RowEncoder(
        users=Vocabulary(pa.array(range(USERS), pa.int64())),
        items=Vocabulary(pa.array(range(ITEMS), pa.int64())),
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
    batch = collate(encoder.encode(table, Path("x")), 4)
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
