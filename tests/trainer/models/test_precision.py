"""The dense part in bfloat16, and on a GPU that is not there: devices, hidden synchronisations, types."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embeddings.sharding import TablePlan
from tests.helpers.training_data import make_config, make_inputs
from tests.trainer.models.test_model import DIM, inputs, shapes
from trainer.config.model import MetaConfig, ModelConfig
from trainer.data.loading.batch import Batch
from trainer.models import BACKBONES
from trainer.models.llm4msr import DenseModel
from trainer.run.build import pipeline_of
from trainer.run.precision import choose_precision
from trainer.training.loop import train

EVERYTHING = {
    "enabled": True,
    "item_knowledge": "match",
    "match_layers": ["user", "scenario"],
    "inputs": ["user", "scenario"],
    "user_layers": 2,
    "alignment": 0.3,
    "noise": 0.1,
    "dropout": 0.1,
}


def dense(backbone: str, autocast: bool, **meta: object) -> DenseModel:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone, hidden=[8, 6], meta=MetaConfig(**{**EVERYTHING, **meta})
    )
    return DenseModel(config, shapes(), DIM, autocast=autocast)


@pytest.mark.parametrize("configured", [None, "float32", "tf32", "bf16"])
def test_a_cpu_has_no_tf32_and_a_gpu_takes_bf16_by_itself(configured: str | None) -> None:
    assert choose_precision(configured, "cuda") == (configured or "bf16")
    assert choose_precision(configured, "cpu") == ("bf16" if configured == "bf16" else "float32")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_bf16_every_backbone_learns_what_it_does_in_float32(backbone: str) -> None:
    """Products differ by bfloat16's rounding; what is kept and what is learned from is float32."""
    exact, rounded = dense(backbone, autocast=False, noise=0.0, dropout=0.0), None
    losses, gradients = [], []
    for autocast in (False, True):
        rounded = dense(backbone, autocast, noise=0.0, dropout=0.0)
        rounded.load_state_dict(exact.state_dict())
        loss, predictions = rounded(*inputs())
        loss.backward()
        assert {loss.dtype, predictions.logits.dtype} == {torch.float32}
        grads = {name: p.grad for name, p in rounded.named_parameters() if p.grad is not None}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        assert all(grad.isfinite().all() for grad in grads.values())
        losses.append(loss.detach())
        gradients.append(torch.cat([grad.flatten() for grad in grads.values()]))
    assert losses[0] != losses[1]  # else nothing was rounded
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


# ---------------------------------------------------------------- a GPU that is not there


class Indexing(TorchFunctionMode):
    """Python's `tensor[...]` by operators that ask no CUDA driver which device is the current one."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        parts, dim = index if isinstance(index, tuple) else (index,), 0
        for number, part in enumerate(parts):
            if part is ...:
                dim = tensor.dim() - sum(later is not None for later in parts[number + 1 :])
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice.Tensor(
                    tensor, dim, part.start, part.stop, part.step or 1
                )
                dim += 1
            elif part is None:
                tensor, dim = tensor.unsqueeze(dim), dim + 1
            elif isinstance(part, int):
                tensor = tensor.select(dim, part)
            else:  # what is behind it are tensors as well, read together
                return torch.ops.aten.index.Tensor(tensor, [*[None] * dim, *parts[number:]])
        return tensor


@contextmanager
def simulated_gpu(autocast: bool = False) -> Iterator[FakeTensorMode]:
    """Tensors have devices, shapes and types but no values: what asks for one raises."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode() as mode, Indexing():
            yield mode
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)


def moved(value: Any, mode: FakeTensorMode | str) -> Any:
    """The same tensors on the simulated GPU, or on "meta"; what the host knows of them stays known."""
    if isinstance(value, Tensor):
        if isinstance(mode, str):
            return value.to(mode)
        return torch.empty_like(mode.from_tensor(value), device="cuda")
    if isinstance(value, KeyedTensor):
        values = moved(value.values(), mode)
        return KeyedTensor(value.keys(), value.length_per_key(), values)
    if isinstance(value, KeyedJaggedTensor):
        values, lengths = moved(value.values(), mode), moved(value.lengths(), mode)
        known = value.length_per_key_or_none()
        return KeyedJaggedTensor(value.keys(), values, lengths=lengths, length_per_key=known)
    if isinstance(value, JaggedTensor):
        return JaggedTensor(moved(value.values(), mode), lengths=moved(value.lengths(), mode))
    if isinstance(value, dict):
        return {name: moved(part, mode) for name, part in value.items()}
    if isinstance(value, Batch):
        return Batch(**{name: moved(part, mode) for name, part in vars(value).items()})
    return value


def step_inputs() -> tuple[KeyedTensor, dict[str, JaggedTensor], KeyedTensor, Batch]:
    """What a step reads; of its ids the host knows how many each key has, as the loader says."""
    pooled, sequences, vectors, batch = inputs()
    for ids in (batch.ids, batch.knowledge):
        ids.length_per_key()
    return pooled, sequences, vectors, batch


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_forward_pass_stays_on_the_gpu_and_waits_for_nothing(
    backbone: str, autocast: bool
) -> None:
    parts = step_inputs()
    model = dense(backbone, autocast=False).train()  # torch.autocast wants a real one
    state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    with simulated_gpu(autocast) as mode:
        on_gpu = {name: moved(tensor, mode) for name, tensor in state.items()}
        given = tuple(moved(part, mode) for part in parts)
        loss, predictions = torch.func.functional_call(model, on_gpu, given)
        assert loss.device.type == predictions.logits.device.type == "cuda"
        assert (loss.dtype, predictions.label.dtype) == (torch.float32, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backward_pass_stays_on_its_device_and_waits_for_nothing(backbone: str) -> None:
    """On the device without memory: autograd has no thread for a GPU that is not there."""
    given = [moved(part, "meta") for part in step_inputs()]
    model = dense(backbone, autocast=False).train().to("meta")
    loss, _ = model(*given)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert {gradient.device.type for gradient in gradients} == {"meta"}


def test_the_simulated_gpu_sees_a_synchronisation_and_a_mixture_of_devices() -> None:
    keys, values, lengths = ["a", "b"], torch.arange(3), torch.tensor([1, 2])
    ids = KeyedJaggedTensor(keys, values, lengths=lengths)
    counted = KeyedJaggedTensor(keys, values, lengths=lengths, length_per_key=[1, 2])
    with simulated_gpu() as mode:
        # torchrec asks for the current stream first, which only a real GPU has.
        with pytest.raises((DataDependentOutputException, AssertionError)):
            moved(ids, mode)["b"]  # counts on the device what the host was not told
        assert moved(counted, mode)["b"].values().device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            moved(torch.zeros(3), mode) + mode.from_tensor(torch.zeros(3))


def test_where_a_table_has_a_cache_its_misses_are_fetched_a_batch_ahead() -> None:
    def table(kernel: str) -> TablePlan:
        return TablePlan("t", "row_wise", kernel, 10, 4, [160], [])

    assert pipeline_of([table("fused"), table("fused_uvm")]) is TrainPipelineSparseDist
    cached = pipeline_of([table("fused"), table("fused_uvm_caching")])
    assert cached is PrefetchTrainPipelineSparseDist


# ---------------------------------------------------------------- quality


@pytest.mark.slow
def test_bf16_trains_as_well_as_float32_within_the_spread_of_seeds(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path / "inputs", users=80)
    losses: dict[str, list[float]] = {"float32": [], "bf16": []}
    for precision, found in losses.items():
        for seed in range(3):
            config = make_config(
                data,
                stores,
                tmp_path / f"{precision}-{seed}",
                train__precision=precision,
                train__seed=seed,
                train__epochs=4,
            )
            found.append(last_loss(train(config)))
    spread = max(losses["float32"]) - min(losses["float32"])
    assert abs(mean(losses["bf16"]) - mean(losses["float32"])) < max(spread, 1e-3), losses
    assert losses["bf16"] != losses["float32"]


def last_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["valid_logloss"] for line in reversed(lines) if line["kind"] == "valid")
