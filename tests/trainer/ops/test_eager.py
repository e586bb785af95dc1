"""The ops where no compiler looks, inside autocast, and on a machine that has torch and triton alone."""

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.paths import ROOT
from trainer.ops import meta_linear, reference, sort_groups

STRATEGIES = ("reference", "grouped")


def inputs(rows: int = 24, keys: int | None = 3) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, 8), (keys or rows, 4), (5, 6, 8), (5, 6)]
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_taken_inside_autocast_are_those_of_the_forward_pass(dtype: torch.dtype) -> None:
    """To the bit. (On a CPU autocast leaves the grouped products alone; the kernels' test is theirs.)"""
    dy = torch.randn(24, 6)

    def gradients(cast: bool) -> tuple[Tensor, ...]:
        leaves = inputs(keys=None)
        y = meta_linear(*leaves, strategy="reference", activation="tanh")
        with torch.autocast("cpu", dtype, enabled=cast):
            return torch.autograd.grad(y, leaves, dy)

    pairs = zip(gradients(cast=False), gradients(cast=True), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_step_inside_autocast(strategy: str, dtype: torch.dtype) -> None:
    leaves = inputs()
    group = torch.arange(24) % 3
    with torch.autocast("cpu", dtype):
        y = meta_linear(*leaves, group=group, strategy=strategy, activation="relu")
        found = torch.autograd.grad(y.float().square().sum(), leaves)
    exact = meta_linear(*leaves, group=group, strategy=strategy, activation="relu")
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    assert y.dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eager_calls_give_the_operators_bits(strategy: str, cast: bool) -> None:
    group, dy = torch.arange(24) % 3, torch.randn(24, 6)

    def run() -> list[Tensor]:
        leaves = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = meta_linear(*leaves, group=group, strategy=strategy, activation="sigmoid")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    plain = run()
    with FlopCounterMode(display=False):  # which operators have to pass by
        watched = run()
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def operators_of(call: Any) -> set[str]:
    """Names of our operators that a profile sees."""
    with torch.profiler.profile() as profile:
        call()
    return {event.name for event in profile.events() if "llm4msr::" in event.name}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_operator_stands_between_eager_training_and_the_products(strategy: str) -> None:
    leaves = inputs()
    call = functools.partial(
        meta_linear, *leaves, group=torch.arange(24) % 3, strategy=strategy, activation="relu"
    )
    assert operators_of(lambda: call().sum().backward()) == set()
    assert operators_of(lambda: sort_groups(torch.arange(24) % 3, 3)) == set()
    with FlopCounterMode(display=False):
        seen = operators_of(lambda: call().sum().backward())
    name = "grouped_linear" if strategy == "grouped" else "meta_linear"
    assert f"llm4msr::{name}" in seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_and_functional_ones_are_refused(strategy: str) -> None:
    h, g, weight, bias = inputs()
    call = functools.partial(meta_linear, group=torch.arange(24) % 3, strategy=strategy)
    (first,) = torch.autograd.grad(call(h, g, weight, bias).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: call(x, g, weight, bias).sum())(h.detach())


def test_fake_tensors_meet_the_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert reference.is_plain_eager(torch.zeros(1))
    with FakeTensorMode():
        fake = [torch.empty(one.shape, device="cuda") for one in inputs(keys=None)]
        assert not reference.is_plain_eager(*fake)
        y = meta_linear(*fake, strategy="fused")
    assert (y.shape, y.device.type) == ((24, 6), "cuda")
    assert not reference.is_plain_eager(*fake)  # nor outside of their mode
    assert not reference.is_plain_eager(torch.zeros(1, device="meta"))


# Everything that a GPU machine with torch and triton alone does not have.
BARE = """
import importlib.metadata, runpy, sys
missing = {"torchrec", "fbgemm_gpu", "pydantic", "pyarrow", "duckdb", "torchx", "transformers", "yaml"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *a: None if name in missing else find_spec(name, *a)
def absent(name):
    if name.split("-")[0].replace("fbgemm", "fbgemm_gpu") in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = absent
sys.meta_path.insert(0, Missing())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (
            "trainer.profiling.meta_layer --batch 64 --rank 2 --in-features 8 --out-features 4 "
            "--rounds 2",
            "forward + backward",
        ),
        ("benchmarks.meta_layer --rounds 2 --shapes 0", "load after"),
        ("benchmarks.diagonal_layer --rounds 2 --shapes 0", "load after"),
        ("launch profile meta-layer --batch 64 --rank 2 --in-features 8 --rounds 2", "of peak"),
    ],
    ids=lambda value: value.split(" ")[0],
)
def test_commands_of_the_op_run_without_torchrec_and_fbgemm(command: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, *command.split()],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
