"""Learning rates of every kind over a run, and optimizers that a device lacks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor

from embeddings.optimizer import TableOptimizer
from llm_knowledge.errors import InputError
from tests.helpers.training_data import make_config, make_inputs
from tests.trainer.training.test_train import lines
from trainer.config.tables import ScheduleConfig
from trainer.observe.metrics_log import RunLog, Window
from trainer.run.build import build
from trainer.run.session import Run
from trainer.training.loop import train
from trainer.training.schedule import share_of_peak


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, 0.325]),
    ],
)
def test_shares_of_the_peak(shape: Any, expected: list[float]) -> None:
    schedule = ScheduleConfig(shape=shape, warmup_steps=2, final=0.1)
    found = [share_of_peak(schedule, step, 5) for step in range(5)]
    assert found == pytest.approx(expected)
    assert share_of_peak(schedule, 5, 5) == pytest.approx(1.0 if shape == "constant" else 0.1)


class Watch:
    """Compares every update of the user table with its gradient, taken from the kernel's output."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.table: Tensor | None = None

    def build(self, *arguments: Any) -> Run:
        run = build(*arguments)
        kernel = run.model.fused_optimizer._optims[0][1]._optims[0][1]._emb_module
        self.table = kernel.split_embedding_weights()[0]
        assert self.table.shape[0] == 41
        before = self.table.clone()

        def forward(_: Any, __: Any, options: dict[str, Tensor], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.add(options, gradient))

        self.pending: tuple[Tensor, Tensor] | None = None
        kernel.register_forward_hook(forward, with_kwargs=True)
        progress = run.pipeline.progress

        def watched(batches: Any) -> Any:
            before.copy_(self.table)
            result = progress(batches)
            if not run.model.training:  # an evaluation
                return result
            ids, gradient = self.pending
            expected = torch.zeros_like(before).index_add(0, ids, gradient)
            moved = before - self.table
            largest = expected.abs().argmax()
            rate = (moved.flatten()[largest] / expected.flatten()[largest]).item()
            assert torch.allclose(moved, rate * expected, rtol=1e-3, atol=1e-7)
            self.rates.append(rate)
            return result

        run.pipeline.progress = watched  # type: ignore[method-assign]
        return run

    def add(self, options: dict[str, Tensor], gradient: Tensor) -> None:
        lengths = options["offsets"].long().diff()
        rows = torch.arange(len(lengths)).repeat_interleave(lengths)
        self.pending = options["indices"].long(), gradient[rows].clone()


@pytest.mark.slow
def test_the_fused_table_moves_by_the_scheduled_rate_also_after_a_resume(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "tables__optimizer": "sgd",
        "tables__learning_rate": 8.0,
        "tables__schedule": "{shape: cosine, warmup_steps: 3, final: 0.25}",
        "train__schedule": "{shape: linear, warmup_steps: 2}",
        "train__checkpoint_every": 5,
    }
    schedule = ScheduleConfig(shape="cosine", warmup_steps=3, final=0.25)
    expected = [8.0 * share_of_peak(schedule, step, 20) for step in range(20)]
    exchange = RunLog.exchange

    def cut(self: RunLog, step: int, *rest: Any) -> Window:
        if step == 13:
            raise KeyboardInterrupt
        return exchange(self, step, *rest)

    tables = []
    for name in ("whole", "broken"):
        watch = Watch()
        monkeypatch.setattr("trainer.training.loop.build", watch.build)
        config = make_config(*inputs, tmp_path / name, **options)
        if name == "broken":
            monkeypatch.setattr(RunLog, "exchange", cut)
            with pytest.raises(KeyboardInterrupt):
                train(config)
            monkeypatch.setattr(RunLog, "exchange", exchange)
            watch.rates = watch.rates[:10]  # what the checkpoint at step 10 knows
        train(config, resume=True)
        assert watch.rates == pytest.approx(expected, rel=1e-3)
        assert watch.table is not None
        tables.append(watch.table.clone())
        written = lines(tmp_path / name, "train")
        assert [line["table_learning_rate"] for line in written] == pytest.approx(expected)
        assert [line["learning_rate"] for line in written][:2] == pytest.approx([0.0005, 0.001])
        assert [line["meta_learning_rate"] for line in written] == [0.001] * 20
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables__optimizer": "adam"}, "CUDA only.*choose sgd, adagrad or rowwise_adagrad"),
        ({"tables__optimizer": "lamb"}, "lamb runs on CUDA only"),
        ({"tables__weight_decay": 0.1}, "tables.weight_decay: 0.1 would be ignored"),
        ({"tables__betas": "[0.8, 0.9]"}, "tables.betas: rowwise_adagrad has no such moments"),
    ],
)
def test_what_a_cpu_would_ignore_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(make_config(*inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_options_have_the_kernels_names() -> None:
    adam = TableOptimizer("adam", 0.1, weight_decay=0.2, betas=(0.8, 0.9))
    adam.check("cuda")
    expected = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2}
    assert adam.kernel_options() == expected
    rowwise = TableOptimizer("rowwise_adagrad", 0.1, weight_decay=0.2)
    rowwise.check("cuda")
    assert rowwise.kernel_options()["weight_decay_mode"] == WeightDecayMode.DECOUPLE
    with pytest.raises(ValueError, match="ignored by adagrad"):
        TableOptimizer("adagrad", 0.1, weight_decay=0.2).check("cuda")


@pytest.mark.slow
def test_inputs_and_match_move_by_their_own_step_size(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    monkeypatch.setattr(
        "trainer.training.loop.build", lambda *given: built.append(build(*given)) or built[0]
    )
    config = make_config(
        *inputs,
        tmp_path / "run",
        train__knowledge_learning_rate="1.0e-9",
        model__meta__inputs="[user]",
    )
    train(config)
    reached = dict(built[0].model.module.dense.meta.named_parameters())
    # What begins at 0 tells how far its step size has moved it.
    for name in ("inputs.user.weight", "match.out.weight"):
        assert 0 < reached[name].abs().max() < 1e-6
    for name in ("user_layers.layers.0.bias", "scenario_layers.out.weight"):
        assert reached[name].abs().max() > 1e-4
    line = lines(tmp_path / "run", "train")[-1]
    assert (line["knowledge_learning_rate"], line["meta_learning_rate"]) == (1e-9, 0.001)
