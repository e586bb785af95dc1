"""The meta-layer op against the materialised oracle: every strategy, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from trainer.ops import grouped_linear, meta_linear
from trainer.ops.meta_linear import MIN_ROWS_PER_GROUP, choose_strategy


def oracle(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Generates every sample's own weight matrix, then multiplies: the definition itself."""
    generated = weight[-1] + torch.einsum("br,roi->boi", g, weight[:-1])
    return torch.einsum("boi,bi->bo", generated, h) + bias[-1] + g @ bias[:-1]


def tensors(
    rows: int, rank: int, i: int, o: int, knowledge_rows: int | None = None
) -> list[Tensor]:
    torch.manual_seed(rows * 1000 + rank)
    shapes = [(rows, i), (knowledge_rows or rows, rank), (rank + 1, o, i), (rank + 1, o)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("rows", "rank", "i", "o"), [(7, 3, 5, 4), (1, 1, 1, 1), (33, 8, 16, 3)])
def test_reference_equals_oracle(rows: int, rank: int, i: int, o: int) -> None:
    inputs = tensors(rows, rank, i, o)
    ours, expected = meta_linear(*inputs, strategy="reference"), oracle(*inputs)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("strategy", ["reference", "grouped", "auto"])
def test_shared_knowledge_equals_oracle(strategy: str) -> None:
    inputs = tensors(40, 3, 6, 5, knowledge_rows=4)
    group = torch.randint(0, 3, (40,))  # row 3 belongs to nobody
    h, g, weight, bias = inputs
    ours = meta_linear(*inputs, group=group, strategy=strategy)
    expected = oracle(h, g[group], weight, bias)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected)
    grads = torch.autograd.grad(ours, inputs, dy)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert grads[1][3].abs().max() == 0


def test_zero_knowledge_is_the_shared_layer() -> None:
    h, g, weight, bias = tensors(9, 4, 5, 6)
    shared = torch.nn.functional.linear(h, weight[-1], bias[-1])
    torch.testing.assert_close(meta_linear(h, torch.zeros_like(g), weight, bias), shared)


def test_gradcheck_and_opcheck() -> None:
    inputs = tensors(5, 2, 3, 4)
    assert torch.autograd.gradcheck(meta_linear, tuple(inputs))
    results = opcheck(torch.ops.llm4msr.meta_linear.default, tuple(inputs))
    assert set(results.values()) == {"SUCCESS"}


def test_empty_batch_and_non_contiguous_input() -> None:
    h, g, weight, bias = tensors(6, 2, 3, 4)
    assert meta_linear(h[:0], g[:0], weight, bias).shape == (0, 4)
    twisted = h.t().contiguous().t()
    torch.testing.assert_close(meta_linear(twisted, g, weight, bias), oracle(h, g, weight, bias))


def test_compiles_without_a_graph_break() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(11, 3, 5, 4)]
    compiled = torch.compile(meta_linear, fullgraph=True, backend="aot_eager")
    expected, ours = meta_linear(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_autocast_gives_bfloat16_and_float32_gradients() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(16, 3, 8, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        y = meta_linear(*inputs)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(y.float(), oracle(*inputs), rtol=0.05, atol=0.2)


def test_choice_follows_rows_per_knowledge_vector() -> None:
    assert choose_strategy(MIN_ROWS_PER_GROUP * 3, 3) == "grouped"
    assert choose_strategy(MIN_ROWS_PER_GROUP * 3 - 1, 3) == "reference"
    assert choose_strategy(10_000, None) == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "fast"}, "unknown strategy"),
        ({"strategy": "grouped"}, "needs group"),
        ({"g": torch.zeros(4, 2)}, "do not fit"),
        ({"bias": torch.zeros(3, 9)}, "do not fit"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    h, g, weight, bias = (t.detach().float() for t in tensors(5, 2, 3, 4))
    arguments = {"h": h, "g": g, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        meta_linear(**arguments)


def test_grouped_linear_keeps_groups_apart() -> None:
    torch.manual_seed(0)
    h = torch.randn(10, 3, requires_grad=True)
    weight, bias = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    group = torch.tensor([2, 0, 2, 0, 0, 2, 2, 0, 0, 2])
    y = grouped_linear(h, weight, bias, group)
    for row in range(10):
        torch.testing.assert_close(y[row], weight[group[row]] @ h[row] + bias[group[row]])
    y[group == 2].sum().backward()
    assert weight.grad is not None
    assert weight.grad[[0, 1, 3]].abs().max() == 0
    assert weight.grad[2].abs().max() > 0
