"""The meta-layer op against the materialised oracle: every strategy, forward and backward."""

import functools
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import diagonal_layer
from benchmarks.layer_tiles import candidates
from benchmarks.meta_layer import COMPILED, NAIVE, PEAK, forms, rows_of, rows_of_a_chunk, table
from benchmarks.meta_layer import main as benchmark
from launch.main import main
from llm_knowledge.errors import InputError
from trainer.models.layers import ScenarioAffine
from trainer.models.m2m import SCENARIO_WIDTH, MetaUnit
from trainer.models.star import Star
from trainer.ops import (
    choose_strategy,
    explain_strategy,
    group_by_key,
    grouped_linear,
    meta_core,
    meta_gate,
    meta_linear,
    sort_groups,
)
from trainer.ops.activation import ACTIVATIONS
from trainer.ops.grouped import (
    can_group_on_device,
    device_backward,
    device_forward,
    split_backward,
    split_forward,
)
from trainer.ops.meta_linear import min_rows_per_group
from trainer.ops.reference import reference_backward, reference_forward
from trainer.profiling.meta_layer import profile_meta_layer, text_of


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """The compiler remembers calls of all tests, and only so many."""
    yield
    torch._dynamo.reset()


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_fused_activation_equals_the_function_applied_after(activation: str, strategy: str) -> None:
    inputs = tensors(24, 3, 6, 5, knowledge_rows=4)
    group = torch.arange(24) % 4
    plain = meta_linear(*inputs, group=group, strategy=strategy)
    expected = plain if activation == "none" else getattr(F, activation)(plain)
    ours = meta_linear(*inputs, group=group, strategy=strategy, activation=activation)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected)
    mine = torch.autograd.grad(ours, inputs, dy)
    for one, other in zip(mine, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_opcheck(activation: str) -> None:
    inputs = tensors(5, 2, 3, 4)
    call = functools.partial(meta_linear, activation=activation)
    assert torch.autograd.gradcheck(call, tuple(inputs))
    results = opcheck(torch.ops.llm4msr.meta_linear.default, (*inputs, activation))
    assert set(results.values()) == {"SUCCESS"}
    fixed = (torch.rand(5, 4).double(), *(one.detach() for one in inputs))
    results = opcheck(
        torch.ops.llm4msr.meta_linear_backward.default, (fixed[0], fixed[0], *fixed[1:], activation)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_grouped_gradcheck_and_opcheck() -> None:
    inputs = tensors(7, 2, 3, 4, knowledge_rows=3)
    group = torch.tensor([2, 0, 0, 2, 2, 0, 2])
    call = functools.partial(meta_linear, group=group, strategy="grouped", activation="leaky_relu")
    assert torch.autograd.gradcheck(call, tuple(inputs))
    weight = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    results = opcheck(
        torch.ops.llm4msr.grouped_linear.default,
        (inputs[0], weight, bias, *sort_groups(group, 3), "relu"),
    )
    assert set(results.values()) == {"SUCCESS"}
    dy, h = torch.randn(7, 4, dtype=torch.float64), inputs[0].detach()
    results = opcheck(
        torch.ops.llm4msr.grouped_linear_backward.default,
        (dy, dy.relu(), h, weight.detach(), *sort_groups(group, 3), "relu"),
    )
    assert set(results.values()) == {"SUCCESS"}
    assert set(opcheck(torch.ops.llm4msr.take_rows.default, (bias, group)).values()) == {"SUCCESS"}
    results = opcheck(torch.ops.llm4msr.add_rows.default, (dy, group, 3))
    assert set(results.values()) == {"SUCCESS"}
    results = opcheck(torch.ops.llm4msr.sort_groups.default, (group, 3))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("rows", [6, 0])
def test_gradients_have_the_strides_that_the_compiler_was_told(rows: int) -> None:
    h, g, weight, bias = (t.detach() for t in tensors(6, 2, 3, 4))
    dy, h, g = torch.randn(6, 4, dtype=torch.float64)[:rows], h[:rows], g[:rows]
    twisted = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (h, g, weight, bias)]
    backward = torch.ops.llm4msr.meta_linear_backward.default
    results = opcheck(backward, (dy, dy, *twisted, "relu"))
    assert set(results.values()) == {"SUCCESS"}
    results = opcheck(
        torch.ops.llm4msr.grouped_linear_backward.default,
        (dy, dy, twisted[0], twisted[2], *sort_groups(torch.arange(rows) % 3, 3), "relu"),
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_empty_batch_gives_empty_output_and_zero_gradients(strategy: str) -> None:
    inputs = tensors(6, 2, 3, 4, knowledge_rows=5)
    nobody = torch.zeros(0, dtype=torch.int64)
    y = meta_linear(inputs[0][:0], *inputs[1:], group=nobody, strategy=strategy, activation="relu")
    assert y.shape == (0, 4)
    for gradient, one in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert gradient.shape == one.shape
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("form", ["core", "gate"])
@pytest.mark.parametrize("knowledge_rows", [None, 3])
def test_empty_batch_of_the_cheap_forms(form: str, knowledge_rows: int | None) -> None:
    h, g, core, bias = tensors(6, 2, 4, 4, knowledge_rows)
    group = None if knowledge_rows is None else torch.zeros(0, dtype=torch.int64)
    h, g = h[:0], g if knowledge_rows else g[:0]
    shared = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    inputs = [h, g, shared, core, bias, shared] if form == "core" else [h, g, shared, bias, bias]
    call = meta_core if form == "core" else meta_gate
    y = call(*inputs, group=group, activation="relu")
    assert y.shape == (0, 4)
    for gradient, one in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert gradient.shape == one.shape
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_non_contiguous_input(strategy: str) -> None:
    keys = 3 if strategy == "grouped" else None
    h, g, weight, bias = tensors(6, 2, 3, 4, keys)
    twisted = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (h, g, weight, bias)]
    assert not any(one.is_contiguous() for one in twisted)
    group = None if keys is None else torch.tensor([0, 9, 2, 9, 1, 9, 0, 9, 2, 9, 0, 9])[::2]
    ours = meta_linear(*twisted, group=group, strategy=strategy)
    expected = oracle(h, g if group is None else g[group], weight, bias)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected).t().contiguous().t()
    inputs = (h, g, weight, bias)
    theirs = torch.autograd.grad(expected, inputs, dy)
    for one, other in zip(torch.autograd.grad(ours, inputs, dy), theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["reference", "grouped", "auto"])
def test_compiles_without_a_graph_break_for_any_batch_size(strategy: str) -> None:
    _, *weights = (
        t.detach().float().requires_grad_() for t in tensors(9, 3, 5, 4, knowledge_rows=2)
    )
    call = functools.partial(meta_linear, strategy=strategy, activation="relu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (33, 21, 64, 100):
        h, group = torch.randn(rows, 5, requires_grad=True), torch.arange(rows) % 2
        expected, ours = call(h, *weights, group=group), compiled(h, *weights, group=group)
        torch.testing.assert_close(ours, expected)
        theirs = torch.autograd.grad(expected.sum(), [h, *weights])
        mine = torch.autograd.grad(ours.sum(), [h, *weights])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_autocast_gives_bfloat16_and_float32_gradients(strategy: str) -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(16, 3, 8, 4, knowledge_rows=2)]
    group = torch.arange(16) % 2
    with torch.autocast("cpu", torch.bfloat16):
        y = meta_linear(*inputs, group=group, strategy=strategy)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    h, g, weight, bias = inputs
    torch.testing.assert_close(y.float(), oracle(h, g[group], weight, bias), rtol=0.05, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["core", "gate"])
def test_cheap_forms_compile_without_a_graph_break_and_take_autocast(form: str) -> None:
    _, g, core, bias = (t.detach().float() for t in tensors(9, 3, 4, 4, knowledge_rows=2))
    down, up = torch.randn(4, 5), torch.randn(4, 4)
    weights = [g, down, core, bias, up] if form == "core" else [g, down, bias, bias + 1]
    leaves = [one.requires_grad_() for one in weights]
    call = functools.partial(meta_core if form == "core" else meta_gate, activation="relu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (33, 21, 64):
        h, group = torch.randn(rows, 5, requires_grad=True), torch.arange(rows) % 2
        expected, ours = call(h, *leaves, group=group), compiled(h, *leaves, group=group)
        check_gradients(ours, expected, [h, *leaves])
    assert counter.frame_count == 1
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(h, *leaves, group=group)
    assert all(
        grad.dtype == torch.float32 for grad in torch.autograd.grad(cast.float().sum(), leaves)
    )
    torch.testing.assert_close(cast.float(), expected, rtol=0.05, atol=0.3)


def test_autocast_leaves_float64_to_the_strategy_that_can_do_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def choose(*where: Any) -> tuple[str, str]:
        asked.append(where[-2])
        return "reference", ""

    module = sys.modules[min_rows_per_group.__module__]  # whose name the function has taken
    monkeypatch.setattr(module, "_choose", choose)
    inputs = tensors(6, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert meta_linear(*inputs).dtype == torch.float64
        meta_linear(*(one.float() for one in inputs))
    assert asked == [torch.float64, torch.bfloat16]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the environment says: sums that depend on who comes first then show."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["reference", "grouped", "core", "gate"])
@pytest.mark.usefixtures("two_threads")
def test_gradients_are_the_same_bits_every_time(form: str) -> None:
    rows, keys = 20_000, 4
    h, g, weight, bias = (t.detach().float() for t in tensors(rows, 4, 32, 32, keys))
    shared = torch.randn(32, 32)
    group = torch.randint(0, keys, (rows,))
    inputs, call = {
        "core": ([h, g, shared, weight, bias, shared.t()], meta_core),
        "gate": ([h, g, shared, bias, bias], meta_gate),
    }.get(form, ([h, g, weight, bias], functools.partial(meta_linear, strategy=form)))
    inputs = [one.clone().requires_grad_() for one in inputs]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*inputs, group=group).square().sum(), inputs)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("layer", ["affine", "star"])
@pytest.mark.usefixtures("two_threads")
def test_layers_of_scenarios_have_the_same_gradients_every_time(layer: str) -> None:
    torch.manual_seed(0)
    x, scenario = torch.randn(20_000, 48), torch.randint(0, 4, (20_000,))
    model = ScenarioAffine(4, 48) if layer == "affine" else Star(48, 4, [16], 0.0, 1)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x, scenario).square().sum(), list(model.parameters()))

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("form", ["reference", "grouped", "diagonal", "gate"])
def test_the_compiler_sees_no_gather_that_it_could_make_atomic(form: str) -> None:
    """Of rows that samples share it would add gradients up in any order, and take any index."""
    h, g, weight, bias = (t.detach() for t in tensors(9, 2, 4, 4, knowledge_rows=3))
    inputs, call = {
        "diagonal": ([h, g, bias, bias], functools.partial(meta_linear, strategy="grouped")),
        "gate": ([h, g, weight[0], bias, bias], meta_gate),
    }.get(form, ([h, g, weight, bias], functools.partial(meta_linear, strategy=form)))
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    leaves = [one.clone().requires_grad_() for one in inputs]
    compiled(*leaves, group=torch.arange(9) % 3).sum().backward()
    assert any("llm4msr" in name for name in seen)
    # "aten.index_put", "aten.index_select", "aten.embedding_dense_backward", "aten.gather", ...
    assert not [name for name in seen if re.match(r"aten\.(index|embed|gather|scatter)", name)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's own compiler is missing")
@pytest.mark.parametrize("strategy", ["reference", "grouped"])
@pytest.mark.usefixtures("two_threads")
def test_compiled_code_equals_eager_and_repeats_its_bits(strategy: str) -> None:
    """With the default backend: the others neither hold us to strides nor fuse a gather."""
    rows, keys = 20_000, 4
    h, g, weight, bias = (t.detach().float() for t in tensors(rows, 4, 16, 16, keys))
    group = torch.randint(0, keys, (rows,))
    inputs = [one.clone().requires_grad_() for one in (h, g, weight, bias, bias)]

    def layers(*leaves: Tensor, group: Tensor) -> Tensor:
        h, g, weight, bias, scale = leaves
        call = functools.partial(meta_linear, group=group, strategy=strategy, activation="relu")
        return call(call(h, g, weight.transpose(1, 2), bias), g, scale, bias)

    compiled = torch.compile(layers, fullgraph=True)

    def gradients(call: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*inputs, group=group).square().mean(), inputs)

    first = gradients(compiled)
    for one, other in zip(first, gradients(layers), strict=True):
        torch.testing.assert_close(one, other)
    for _ in range(5):
        again = gradients(compiled)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises((IndexError, ValueError), match=r"out of range|outside"):
        compiled(*inputs, group=group - 1)


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest intermediate result."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return result


def test_neither_generated_weights_nor_the_outer_product_are_stored() -> None:
    h, g, weight, bias = (t.detach() for t in tensors(300, 8, 12, 10))
    with LargestTensor() as largest:
        y = reference_forward(h, g, weight, bias, "none")
        reference_backward(torch.ones_like(y), h, g, weight, bias)
    assert largest.bytes == 8 * 300 * 12  # [B, i], 8 and 10 times less than [B, r, i] and [B, o, i]


def test_choice_follows_device_type_and_rows_per_knowledge_vector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choice(rows: int, groups: int | None, **where: Any) -> str:
        return choose_strategy(rows, 32, 128, 128, groups=groups, **where)[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a Hopper is assumed
    needed = min_rows_per_group("cpu", 32, 128, 128)
    assert 6 < needed < 7
    assert min_rows_per_group("cpu", 8, 32, 32) > 25  # small products do not pay for the calls
    assert choice(21, 3) == "grouped"
    assert choice(18, 3) == "reference"
    assert choice(10_000, None) == "reference"
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    if importlib.util.find_spec("triton"):
        assert choice(10_000, None, device="cuda") == "fused"
        assert choice(10_000, None, **bf16) == "fused"
        assert choice(10_000, 3, device="cuda") == "fused"  # float32 has no grouped product there
        assert choice(10_000, None, device="cuda", dtype=torch.float64) == "reference"
        assert choice(10_000, 2_000, **bf16) == "fused"
    assert choice(10_000, 3, **bf16) == "grouped"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, has_kernel in ((8, False), (9, True), (10, True), (12, False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, m=major: SimpleNamespace(major=m)
        )
        assert can_group_on_device(torch.bfloat16, 128, 128) is has_kernel
        assert not can_group_on_device(torch.float16, 128, 128)
        assert not can_group_on_device(torch.bfloat16, 128, 33)


def test_choice_never_stores_weights_by_the_gigabyte() -> None:
    """Eight rows per knowledge row save products, but 4,096 matrices of 256 x 256 are a gigabyte."""
    strategy, why = choose_strategy(4096 * 8, 8, 256, 256, groups=4096)
    assert strategy == "reference"
    assert why.startswith("weights of 4,096 knowledge rows would take 1,024 MiB")
    assert choose_strategy(1024 * 8, 8, 256, 256, groups=1024)[0] == "grouped"  # 256 MiB
    assert choose_strategy(1025 * 8, 8, 256, 256, groups=1025)[0] == "reference"
    halves = {"groups": 2048, "device": "cuda", "dtype": torch.bfloat16}
    assert choose_strategy(2048 * 64, 8, 256, 256, **halves)[0] == "grouped"
    assert choose_strategy(2049 * 64, 8, 256, 256, **halves | {"groups": 2049})[0] != "grouped"


def test_the_meta_unit_of_m2m_stores_no_weights_of_samples() -> None:
    """A shape at which grouped would save products: ten rows per sample, wide enough."""
    unit, rows = MetaUnit(128), 10
    h, s = torch.randn(50 * rows, 128), torch.randn(50, SCENARIO_WIDTH)
    assert choose_strategy(len(h), SCENARIO_WIDTH, 128, 128, groups=len(s))[0] == "grouped"
    with LargestTensor() as largest:
        y = unit(h, s)
        y.sum().backward()
    assert largest.bytes <= 4 * max(len(h) * 128, unit.weight.numel())
    expected = oracle(h, s.repeat_interleave(rows, 0), unit.weight, unit.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_choice_is_compiled_for_any_number_of_large_knowledge_rows() -> None:
    """Past what may be stored, for which `choose_strategy` has words with numbers in them."""
    weight, bias, h = torch.zeros(2, 512, 1024), torch.zeros(2, 512), torch.zeros(2048, 1024)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(meta_linear, fullgraph=True, backend=counter)
    for groups in (140, 150, 160):
        group = torch.arange(len(h)) % groups
        compiled(h, torch.zeros(groups, 1), weight, bias, group=group)
    assert counter.frame_count == 2  # the second for any number


def test_choice_can_be_asked() -> None:
    line = explain_strategy(4096, 32, 128, 64, groups=3)
    assert line.startswith(
        "meta layer 128 to 64, rank 32, 4,096 rows, 3 knowledge rows, cpu float32"
    )
    assert "grouped (at least 8 rows per knowledge row)" in line
    assert explain_strategy(9, 1, 1, 1, strategy="reference").endswith("reference (configured)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "fast"}, "unknown strategy"),
        ({"strategy": "grouped"}, "needs group"),
        ({"strategy": "fused"}, "needs"),
        ({"activation": "gelu"}, "unknown activation"),
        ({"g": torch.zeros(4, 2)}, "do not fit"),
        ({"bias": torch.zeros(3, 9)}, "do not fit"),
        ({"weight": torch.zeros(3, 4)}, "do not fit"),
        ({"weight": torch.zeros(3, 3)}, "bias .* must be"),
        ({"weight": torch.zeros(3)}, "do not fit"),
        ({"g": torch.zeros(5, 2).bfloat16()}, "one type, not bfloat16, float32"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    h, g, weight, bias = (t.detach().float() for t in tensors(5, 2, 3, 4))
    arguments = {"h": h, "g": g, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        meta_linear(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("wrong", "held"), [(3, "from 0 to 3"), (-1, "from -1 to 2")])
def test_a_group_outside_the_knowledge_rows_is_refused(
    wrong: int, held: str, compiled: bool
) -> None:
    inputs = tensors(6, 2, 3, 4, knowledge_rows=3)
    group = torch.tensor([0, 1, 2, wrong, 1, 0])
    call: Any = meta_linear
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=rf"{held}, outside \[0, 3\)"):
        call(*inputs, group=group, strategy="grouped")
    with pytest.raises(IndexError):
        call(*inputs, group=group, strategy="reference")
    square, diagonals = torch.randn(6, 4).double(), inputs[3]
    for strategy in ("reference", "grouped"):
        with pytest.raises(IndexError):
            call(*(square, inputs[1], diagonals, diagonals), group=group, strategy=strategy)


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_a_group_per_sample_is_needed(strategy: str) -> None:
    inputs = tensors(6, 2, 3, 4, knowledge_rows=3)
    with pytest.raises(ValueError, match="group"):
        meta_linear(*inputs, group=torch.tensor([0, 1, 2]), strategy=strategy)


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
    with pytest.raises(ValueError, match="sorted into 3 groups, weights for 4"):
        grouped_linear(h, weight, bias, sort_groups(group, 3))


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_a_forward_mode_derivative_is_refused_and_not_zero(strategy: str) -> None:
    h, g, weight, bias = (t.detach() for t in tensors(6, 2, 4, 4, knowledge_rows=3))
    call = functools.partial(meta_linear, group=torch.arange(6) % 3, strategy=strategy)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: call(x, g, weight, bias), (h,), (h,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(lambda x: call(h, g, x, bias))(weight)
    # Diagonals are the library's own products here.
    y, tangent = torch.func.jvp(lambda x: call(x, g, bias, 0 * bias), (h,), (h,))
    torch.testing.assert_close(y, tangent)


def test_float16_products_beyond_its_range_are_scaled_down_first() -> None:
    h, g = torch.full((2, 16), 300.0).half(), torch.tensor([[0.0], [1 / 1024]]).half()
    weight, bias = torch.zeros(2, 4, 16).half(), torch.ones(2, 4).half()
    weight[0] = 300.0
    leaves = [one.requires_grad_() for one in (h, g, weight, bias)]
    y = meta_linear(*leaves, strategy="reference")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.detach(), oracle(*(one.detach().float() for one in leaves)).half())
    gradients = torch.autograd.grad(y.sum(), leaves[2:])
    assert all(one.isfinite().all() and one.dtype == torch.float16 for one in gradients)


@pytest.mark.parametrize("strategy", ["auto", "reference", "grouped"])
@pytest.mark.parametrize(("i", "o"), [(0, 4), (3, 0)])
def test_widths_of_zero(strategy: str, i: int, o: int) -> None:
    h, g, weight, bias = tensors(6, 2, 3, 4, knowledge_rows=3)
    inputs, group = [h[:, :i], g, weight[:, :o, :i], bias[:, :o]], torch.arange(6) % 3
    y = meta_linear(*inputs, group=group, strategy=strategy)
    torch.testing.assert_close(y, oracle(inputs[0], g[group], *inputs[2:]))


def test_a_device_without_autocast_is_no_hindrance() -> None:
    inputs = [one.detach().to("meta") for one in tensors(6, 2, 3, 4)]
    assert meta_linear(*inputs).shape == (6, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_grouped_product_equals_the_split_loop(dtype: torch.dtype) -> None:
    """What CUDA runs; PyTorch has it on the CPU too, where the loop is faster."""
    torch.manual_seed(1)
    h, dz = torch.randn(50, 16).to(dtype), torch.randn(50, 24).to(dtype)
    weight, bias = torch.randn(5, 24, 16).to(dtype), torch.randn(5, 24).to(dtype)
    group = torch.randint(0, 4, (50,)) * 4 // 3  # group 3 is empty
    ends = sort_groups(group, 5).ends
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {}
    ours, expected = device_forward(h, weight, bias, ends), split_forward(h, weight, bias, ends)
    torch.testing.assert_close(ours, expected, **tolerance)
    mine = device_backward(dz, h, weight, ends)
    for one, other in zip(mine, split_backward(dz, h, weight, ends), strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert mine[1][3].abs().max() == 0


@pytest.mark.parametrize("size", [None, 4, 9])
def test_group_by_key_generates_each_key_once(size: int | None) -> None:
    keys = torch.tensor([50, -7, 50, 9, 9, 50, 1 << 40])
    first, group = group_by_key(keys, size)
    assert first.shape[0] == (size or 4)
    assert torch.equal(keys[first[group]], keys)
    assert sorted(set(group.tolist())) == [0, 1, 2, 3]
    h, g, weight, bias = (t.detach() for t in tensors(7, 3, 5, 4))
    g = torch.stack([torch.sin(keys * j / 10.0) for j in (1, 2, 3)], dim=1).double()
    ours = meta_linear(h, g[first], weight, bias, group=group, strategy="grouped")
    torch.testing.assert_close(ours, oracle(h, g, weight, bias))


def test_group_by_key_refuses_more_keys_than_promised() -> None:
    with pytest.raises(RuntimeError, match="more distinct keys than size"):
        group_by_key(torch.tensor([1, 2, 3]), size=2)
    for size in (None, 5):
        first, group = group_by_key(torch.tensor([], dtype=torch.int64), size)
        assert first.shape == group.shape == (0,)
        h, g, weight, bias = (t.detach() for t in tensors(6, 2, 3, 4))
        y = meta_linear(h[:0], g[:0][first], weight, bias, group=group, strategy="grouped")
        assert y.shape == (0, 4)


def check_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, inputs, dy)
    for one, other in zip(torch.autograd.grad(ours, inputs, dy), theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strategy", ["reference", "grouped"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_core_equals_the_full_layer_with_factored_slices(
    strategy: str, activation: str | None
) -> None:
    h, g, core, core_bias = tensors(12, 3, 4, 4, knowledge_rows=2)
    h = torch.randn(12, 10, dtype=torch.float64, requires_grad=True)
    down = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    up = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    group = torch.arange(12) % 2
    ours = meta_core(
        h, g, down, core, core_bias, up, group=group, activation=activation, strategy=strategy
    )
    expected = oracle(h, g[group], up @ core @ down, core_bias @ up.t())
    expected = torch.relu(expected) if activation else expected
    check_gradients(ours, expected, [h, g, down, core, core_bias, up])


@pytest.mark.parametrize("strategy", ["auto", "reference", "grouped"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_gate_equals_the_full_layer_with_diagonal_slices(
    grouped: bool, activation: str | None, strategy: str
) -> None:
    h, g, _, bias = tensors(12, 3, 5, 6, knowledge_rows=2 if grouped else None)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    group = torch.arange(12) % 2 if grouped else None
    call = functools.partial(
        *(meta_gate, h, g, weight, scale, bias),
        group=group,
        activation=activation,
        strategy=strategy,
    )
    if strategy == "grouped" and not grouped:
        with pytest.raises(ValueError, match="needs group"):
            call()
        return
    ours = call()
    per_sample = g if group is None else g[group]
    expected = oracle(h, per_sample, torch.diag_embed(scale) @ weight, bias)
    expected = torch.sigmoid(expected) if activation else expected
    check_gradients(ours, expected, [h, g, weight, scale, bias])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_diagonal_slices_gradcheck(activation: str) -> None:
    h, g, _, bias = tensors(5, 2, 3, 4)
    weight = torch.randn_like(bias, requires_grad=True)
    h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    call = functools.partial(meta_linear, activation=activation)
    assert torch.autograd.gradcheck(call, (h, g, weight, bias))


def test_diagonals_in_bfloat16_are_summed_in_float32() -> None:
    """A hundred scales of 1/64 beside one of 64: sums in bfloat16 would not move from 64."""
    ones, weight = torch.ones(3, 100), torch.full((101, 2), 1 / 64)
    weight[-1] = 64.0
    y = meta_linear(
        torch.ones(3, 2).bfloat16(), *(t.bfloat16() for t in (ones, weight, 0 * weight))
    )
    torch.testing.assert_close(y, torch.full((3, 2), 64 + 100 / 64).bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_diagonals_take_autocast_and_compile(strategy: str) -> None:
    h, g, _, bias = (t.detach().float() for t in tensors(16, 3, 8, 4, knowledge_rows=2))
    inputs = [one.requires_grad_() for one in (h[:, :4].clone(), g, bias + 1, bias)]
    group = torch.arange(16) % 2
    call = functools.partial(meta_linear, group=group, strategy=strategy, activation="tanh")
    expected = call(*inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    check_gradients(compiled(*inputs), expected, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*inputs)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_diagonals_are_shared_where_that_is_faster() -> None:
    def choice(rows: int, groups: int | None, **where: Any) -> str:
        return choose_strategy(rows, 8, 96, 96, groups=groups, diagonal=True, **where)[0]

    assert choice(1000, None) == "reference"
    assert choice(1000, 500) == "grouped"
    assert choice(1000, 501) == "reference"
    if importlib.util.find_spec("triton"):
        assert choice(1000, 3, device="cuda", dtype=torch.bfloat16) == "fused"
    assert choice(1000, 3, device="cuda", dtype=torch.float64) == "grouped"
    line = explain_strategy(1000, 8, 96, 96, groups=3, diagonal=True)
    assert line.startswith("meta layer diagonal of 96, rank 8, 1,000 rows, 3 knowledge rows")
    assert line.endswith("grouped (at least 2 rows per knowledge row)")


def test_gate_refuses_what_does_not_fit() -> None:
    h, g, weight = torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(6, 5)
    with pytest.raises(ValueError, match="meta_gate"):
        meta_gate(h, g, weight, torch.zeros(3, 6), torch.zeros(4, 6))


def test_every_form_in_the_benchmark_computes_the_same_numbers() -> None:
    inputs = [t.detach().float().requires_grad_() for t in tensors(1001, 3, 8, 6)]
    found = forms(inputs)
    expected = oracle(*inputs)
    for name, (call, _, counted, _) in found.items():
        if counted == "reference":  # the grouped ones have other knowledge
            torch.testing.assert_close(call(), expected, msg=name)
    assert len(found) == 9


@pytest.mark.parametrize(("width", "rows"), [(128, 3072), (256, 1536), (512, 768)])
def test_chunks_of_the_library_form_stay_in_the_cache_of_a_gpu(width: int, rows: int) -> None:
    """At r = 32 in bfloat16: U [rows, 33, o] of at most 25 MiB, half of an H100's L2."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(33, width, width, device="cuda", dtype=torch.bfloat16)
    assert rows_of_a_chunk(weight) == rows
    assert rows * 33 * width * 2 <= 25 << 20
    assert rows_of_a_chunk(torch.empty(33, 8, 8)) == 256


def test_benchmark_of_diagonals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [
        torch.randn(*shape, requires_grad=True) for shape in ((200, 6), (200, 3), (4, 6), (4, 6))
    ]
    found = diagonal_layer.forms(inputs)
    h, g, weight, bias = inputs
    for name, (call, by) in found.items():
        per_sample = g if by is inputs else by[1][call.keywords["group"]]  # the others share rows
        expected = torch.relu(oracle(h, per_sample, torch.diag_embed(weight), bias))
        torch.testing.assert_close(call(*by), expected, msg=name)
    assert len(found) == 6
    file = tmp_path / "figures" / "diagonal.json"
    diagonal_layer.main(["--rounds", "2", "--shapes", "1", "--out", str(file)])
    (shape,) = json.loads(file.read_text())["shapes"]
    assert (shape["batch"], shape["rank"], shape["width"]) == diagonal_layer.SHAPES["cpu"][0]
    assert [row["form"] for row in shape["rows"]] == list(found)
    library = shape["rows"][0]["step"]
    assert library["times_library"]["median"] == 1
    # h, dz and dh, h, dz: five arrays of [1024, 96] in float32.
    moved = 5 * 1024 * 96 * 4 / library["ms"]["median"] / 1e6
    assert library["gb_per_second"] == pytest.approx(moved)
    assert "| ours: grouped, 3 keys |" in capsys.readouterr().out


def measurements(unit: float) -> dict[str, list[float]]:
    """Seconds of three forms and of the square product, forward and three times that for a step."""
    seconds = {NAIVE: 20.0, f"loop{COMPILED}": 8.0, f"einsum{COMPILED}": 6.0, "ours: fused": 2.0}
    found = {f"{name}|forward": [unit * one] * 3 for name, one in seconds.items()}
    found |= {f"{name}|step": [3 * unit * one] * 3 for name, one in seconds.items()}
    return found | {PEAK: [unit] * 3}


def test_table_of_a_gpu_has_the_ratio_to_the_best_compiled_form_and_memory() -> None:
    seconds = measurements(1e-5)
    work = {name.split("|")[0]: 2 * 64**3 for name in seconds if name != PEAK}
    peaks = dict.fromkeys(seconds, 5 << 20)
    rows = rows_of(work, seconds, peaks, 64)
    ours = rows[-2]
    for kind in ("forward", "step"):
        assert ours[kind]["times_naive"]["median"] == pytest.approx(10)
        assert ours[kind]["times_compiled"]["median"] == pytest.approx(3)
        assert ours[kind]["fraction_of_peak"]["median"] == pytest.approx(0.5)
    lines = table((64, 1, 8, 8), "bfloat16", rows).splitlines()
    assert lines[2].count("x best library form") == 2
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[0] == "ours: fused"
    assert [cell.split(" ")[0] for cell in cells[1:6]] == ["0.020", "10.0", "3.0", "50%", "5"]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_table_of_a_cpu_leaves_out_what_it_has_not() -> None:
    seconds = {name: found for name, found in measurements(1.0).items() if COMPILED not in name}
    work = {name.split("|")[0]: 2 * 64**3 for name in seconds if name != PEAK}
    lines = table(
        (64, 1, 8, 8), "float32", rows_of(work, seconds, dict.fromkeys(seconds), 64)
    ).splitlines()
    assert lines[2] == (
        "| form | forward ms | x naive | of peak | forward + backward ms | x naive | of peak |"
    )


@pytest.mark.parametrize("arguments", [["--tiles"], ["--device", "cuda"]])
def test_benchmark_refuses_what_needs_a_gpu(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark(arguments)
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        (family + kernel, width)
        for family in ("", "diagonal_")
        for kernel in ("forward", "backward_input", "backward_weight")
        for width in (128, 512)
    ],
)
def test_candidate_tiles_are_what_the_table_would_give_out(
    kernel: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.ops import triton_tiles

    depth = 16384 if kernel.endswith("backward_weight") else width
    lines = candidates(kernel, 2, width, depth)
    assert len(set(lines)) == len(lines)
    assert 30 < len(lines) < 120  # about a second each to compile
    monkeypatch.setattr(triton_tiles, "TILES", list(triton_tiles.TILES))
    shipped, _ = triton_tiles.choose_tile(kernel, 2, width, depth)
    assert shipped in [line[-1] for line in lines]
    for line in lines:
        triton_tiles.TILES.insert(0, line)
        assert triton_tiles.choose_tile(kernel, 2, width, depth) == (line[-1], line[3] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [None, 2])
def test_profile_names_the_strategy_and_its_share_of_the_peak(distinct: int | None) -> None:
    report = profile_meta_layer(256, 4, 64, 64, distinct, rounds=2)
    assert report["strategy"] == ("reference" if distinct is None else "grouped")
    for kind in ("forward", "step"):
        assert 0 < report[kind]["low"] <= report[kind]["median"] <= report[kind]["high"]
        assert 0 < report[kind]["fraction_of_peak"] < 1.5
    assert report["explanation"] in text_of(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "distinct"), [("core", None), ("core", 2), ("gate", 2), ("gate", None)]
)
def test_profile_knows_the_cheap_kinds(kind: str, distinct: int | None) -> None:
    one = profile_meta_layer(64, 4, 32, 16, distinct, kind=kind, core_width=8, rounds=2)
    assert one["explanation"].startswith(f"meta {kind} of 32 to 16: ")
    # By hand: B (i m + m o) and the core of m x m; B i o and two products of g by [r, o].
    work = 2 * 64 * 8 * 48 + 2 * 64 * 5 * 8 * 8  # 32 rows a key are too few to group
    if kind == "gate":
        work = 2 * 64 * 32 * 16 + 4 * (distinct or 64) * 4 * 16
    for name, times in (("forward", 1), ("step", 3)):
        gflops = times * work / one[name]["median"] / 1e6
        assert one[name]["gflops"] == pytest.approx(gflops)
    shared = kind == "gate" and distinct is not None
    assert one["strategy"] == ("grouped" if shared else "reference")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"distinct": 0},
        {"dtype": "int8"},
        {"kind": "full"},
        {"strategy": "fused"},
        {"strategy": "grouped"},
    ],
)
def test_profile_refuses_what_it_cannot_run(wrong: dict) -> None:
    sizes = {"batch": 8, "rank": 2, "in_features": 4, "out_features": 4}
    with pytest.raises(InputError, match="profile meta-layer"):
        profile_meta_layer(**sizes | wrong)


def test_profile_command_prints_the_report(capsys: pytest.CaptureFixture) -> None:
    words = "profile meta-layer --batch 64 --rank 2 --in-features 8 --out-features 4 --rounds 2"
    assert main([*words.split(), "--distinct", "2", "--strategy", "reference", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["strategy"] == "reference"
    assert "8 to 4, rank 2, 64 rows, 2 knowledge rows, cpu float32" in report["explanation"]
