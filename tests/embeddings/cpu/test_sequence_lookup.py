"""Vectors per id by the kernel for bags: what they are, and learn, by the kernel without."""

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.optimizer import ON_EVERY_DEVICE, TableOptimizer, fuse_optimizer
from embeddings.sharding import Hardware, plan_sharding, shard
from embeddings.tables import SparseFeatures, Table, local_pieces
from trainer.distributed.process_group import distributed

ROWS, SAMPLES = 30, 5
HARDWARE = Hardware(1, 1, "cpu", 0, 2**30, 1e9, 1e9, 1e9, 1e9, reserved=0.1)
TABLES = [
    Table("user", 10, 8, ("user",)),
    Table("item", ROWS, 8, ("item", "history"), sequence=True, ids_per_sample=(1, 3)),
]


def batch(ids: list[int]) -> KeyedJaggedTensor:
    """User 0 and item 1 each, and a history that ends in `ids`; without any, no sample has an id."""
    if not ids:
        return KeyedJaggedTensor(
            ["user", "item", "history"],
            torch.empty(0, dtype=torch.long),
            lengths=torch.zeros(3 * SAMPLES, dtype=torch.long),
        )
    lengths = torch.tensor([1] * 2 * SAMPLES + [0, len(ids), 0, 2, 0])
    values = torch.tensor([0] * SAMPLES + [1] * SAMPLES + [*ids, 2, 2])
    return KeyedJaggedTensor(["user", "item", "history"], values, lengths=lengths)


def learn(
    rule: str, batches: list[KeyedJaggedTensor], shortcuts: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Vectors of every batch, a step after each, and the item table [rows, dim] at the end."""
    torch.manual_seed(0)
    with distributed(30) as runtime:
        model = SparseFeatures(TABLES[:1], TABLES[1:], init_std=0.5)
        fuse_optimizer(model.parameters(), TableOptimizer(rule, 0.3))
        plan = plan_sharding(model, TABLES, {}, SAMPLES, HARDWARE)
        sharded = shard(model, plan, runtime.device, shortcuts)
        found = []
        for ids in batches:
            _, sequences = sharded(ids)
            vectors = torch.cat([sequences[name].values() for name in ("item", "history")])
            assert vectors.shape == (len(ids.values()) - int(ids["user"].lengths().sum()), 8)
            found.append(vectors.detach().clone())
            (vectors * torch.arange(8.0)).square().sum().backward()
        table = sharded.state_dict()["sequences.embeddings.item.weight"]
        return found, local_pieces(table)[0][0].clone()


@pytest.mark.parametrize("rule", ON_EVERY_DEVICE)
def test_values_and_updates_are_those_of_the_kernel_without_bags(rule: str) -> None:
    batches = [batch([3, 3, 29]), batch([4] * 40), batch([]), batch(list(range(ROWS)))]
    vectors, table = learn(rule, batches)
    expected, other = learn(rule, batches, shortcuts=False)
    for one, two in zip(vectors, expected, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(table, other)
    assert [len(one) for one in vectors] == [10, 47, 0, 37]
    assert torch.equal(vectors[0][0], vectors[0][4])  # item 1 of the first and the last sample
    assert not torch.equal(vectors[0][0], vectors[1][0])  # a step has moved it


def test_the_kernel_for_bags_is_in_use() -> None:
    with torch.profiler.profile() as profile:
        learn("sgd", [batch([3, 4, 5])])
    called = [event.key for event in profile.key_averages()]
    assert "fbgemm::split_embedding_codegen_forward_cpu" in called
    assert not [name for name in called if "nobag" in name]
