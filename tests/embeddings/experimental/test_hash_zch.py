"""torchrec's hash-based tables: what can be said of them without a GPU."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.sharding import shard, sharders
from embeddings.tables import HashZch, SparseFeatures, Table
from llm_knowledge.errors import InputError
from tests.helpers.training_data import make_config, make_inputs
from trainer.distributed.process_group import distributed
from trainer.training.loop import train

ROWS = "{user_rows: 32, item_rows: 32}"


def test_tables_are_sharded_and_looked_up() -> None:
    with distributed(30) as runtime:
        tables = [Table("user", 32, 8, ("user",)), Table("item", 64, 8, ("item", "history"))]
        model = SparseFeatures(tables[:1], tables[1:], init_std=0.01, hash_zch=HashZch(buckets=8))
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=1, compute_device="cpu"),
            constraints={
                table.name: ParameterConstraints(["row_wise"], ["fused"]) for table in tables
            },
        )
        plan = planner.collective_plan(model, sharders(model), dist.group.WORLD)
        sharded = shard(model, plan, runtime.device).eval()
        values = torch.tensor([5, 2**61, 7, 2**40 + 3, 7, 7, 5])
        lengths = torch.tensor([1, 1, 1, 1, 2, 1])
        ids = KeyedJaggedTensor(["user", "item", "history"], values, lengths=lengths)
        pooled, sequences = sharded(ids)
        assert pooled["user"].shape == (2, 8)
        history = sequences["history"].values()
        assert history.shape == (3, 8)
        torch.testing.assert_close(history[0], sequences["item"].values()[0], rtol=0, atol=0)
        assert not torch.equal(history[0], history[2])
        with pytest.raises(RuntimeError, match="readonly"):  # why a CPU is refused
            sharded.train()(ids)


def test_a_run_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data, _ = make_inputs(tmp_path / "inputs")
    config = make_config(
        data, None, tmp_path / "run", tables__ids="hash_zch", tables__zero_collision=ROWS
    )
    with pytest.raises(InputError, match=r"tables.ids: hash_zch runs on CUDA only.*zero_collision"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{user_rows: 32, item_rows: 32, admission: 2}", "admission would be ignored by hash_zch"),
        ("{user_rows: 32}", "needs zero_collision.user_rows and zero_collision.item_rows"),
    ],
)
def test_options_that_it_does_not_have(tmp_path: Path, options: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_config(
            tmp_path, None, tmp_path, tables__ids="hash_zch", tables__zero_collision=options
        )
