"""Pooling of ragged steps against a loop over samples and steps, forward and backward."""

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from trainer.features.pooling import FieldShape, SequencePooling, SequenceShape

FIELDS = (
    FieldShape("steps_item", 4, "item"),
    FieldShape("steps_gap", 3),
    FieldShape("steps_author", 2, "feature_author", optional=True),
)
LENGTHS = [2, 0, 3, 1, 0]


def some_vectors() -> dict[str, JaggedTensor]:
    lengths = torch.tensor(LENGTHS)
    made = {
        field.key: JaggedTensor(torch.randn(6, field.width, requires_grad=True), lengths=lengths)
        for field in FIELDS
    }
    made["item"] = JaggedTensor(
        torch.randn(5, 4, requires_grad=True), lengths=torch.ones(5, dtype=torch.int64)
    )
    # The third sample has no author of its own.
    of_target = torch.tensor([1, 1, 0, 1, 1])
    made["feature_author"] = JaggedTensor(torch.randn(4, 2, requires_grad=True), lengths=of_target)
    return made


def looped(layer: SequencePooling, vectors: dict[str, JaggedTensor], there: Tensor) -> Tensor:
    """The same by its words: one step after the other."""
    items, authors, begin, rows = vectors["item"].to_dense(), vectors["feature_author"], 0, []
    for sample, length in enumerate(LENGTHS):
        own = authors.to_dense()[sample]
        query = torch.cat([items[sample][0], own[0] if len(own) else torch.zeros(2)])
        summed = torch.zeros(layer.shape.width)
        for step in range(begin, begin + length):
            item, gap, author = (vectors[field.key].values()[step] for field in FIELDS)
            author = author * there[step]
            if layer.weigh is None:
                summed = summed + torch.cat([item, gap, author])
                continue
            key = torch.cat([item, author])
            weight = layer.weigh(torch.cat([query, key, query - key, query * key, gap]))
            summed = summed + weight * key
        begin += length
        rows.append(summed / max(length, 1) if layer.shape.pooling == "mean" else summed)
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["attention", "sum", "mean"])
def test_steps_are_pooled_as_a_loop_would(pooling: str) -> None:
    torch.manual_seed(0)
    layer = SequencePooling(SequenceShape("x", pooling, "features", FIELDS))
    there = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    vectors = some_vectors()
    leaves = [part.values() for part in vectors.values()] + list(layer.parameters())
    found = layer(vectors, {"steps_author": there})
    wanted = looped(layer, vectors, there)
    torch.testing.assert_close(found, wanted)
    assert found.shape == (5, layer.shape.width)
    assert not found[[1, 4]].any()  # no steps
    seed = torch.randn_like(found)
    gradients = torch.autograd.grad(found, leaves, seed, allow_unused=True)
    for one, other in zip(
        gradients, torch.autograd.grad(wanted, leaves, seed, allow_unused=True), strict=True
    ):
        if one is None:  # sums do not look at the target
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(one, other)
    missing = gradients[2][torch.tensor([1, 5])]
    assert not missing.any()  # a missing step trains no row


def test_a_batch_without_a_step_is_pooled_to_zeros() -> None:
    layer = SequencePooling(SequenceShape("x", "attention", "features", FIELDS[:2]))
    nothing = torch.zeros(2, dtype=torch.int64)
    vectors = {
        field.key: JaggedTensor(torch.empty(0, field.width), lengths=nothing)
        for field in FIELDS[:2]
    } | {"item": JaggedTensor(torch.randn(2, 4), lengths=nothing + 1)}
    assert layer(vectors, {}).tolist() == [[0.0] * 4] * 2
