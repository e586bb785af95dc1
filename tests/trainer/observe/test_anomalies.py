"""Guard rails on one rank: spikes, damaged tables, limits of rolling back; several: tests/drills."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

import trainer.training.loop
from llm_knowledge.errors import InputError
from tests.drills.fault_drill import at_batch, losses
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.directory import checkpoints
from trainer.observe.anomalies import incidents, keep_from_tables
from trainer.run.session import Run
from trainer.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("guard"))[0]


@pytest.fixture
def before_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(
        trainer.training.loop, "build", trainer.training.loop.build
    )  # put back afterwards
    return at_batch


def damage_table(run: Run, batch: Any) -> None:
    weight = run.model.state_dict()["sparse.pooled.embedding_bags.user.weight"]
    weight.local_shards()[0].tensor[3].fill_(float("nan"))


def test_a_damaged_table_is_found_before_it_is_saved(
    data: Path, tmp_path: Path, before_batch: Callable[..., None]
) -> None:
    before_batch(9, damage_table)
    config = make_config(
        data,
        None,
        tmp_path / "run",
        train__checkpoint_every=2,
        train__eval_every=100,
        train__guard="{non_finite: skip}",  # else the loss of who reads the row tells first
    )
    with pytest.raises(InputError, match=r"step 10: not finite: rank 0: .*user.weight \(1 rows\)"):
        train(config)
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000008"


@pytest.mark.slow
def test_a_damaged_table_is_rolled_back(
    data: Path, tmp_path: Path, before_batch: Callable[..., None]
) -> None:
    whole = train(make_config(data, None, tmp_path / "whole", train__checkpoint_every=2))
    before_batch(9, damage_table)
    guard = "{non_finite: skip, damage: rollback}"
    config = make_config(
        data, None, tmp_path / "run", train__checkpoint_every=2, train__guard=guard
    )
    run = train(config)
    assert incidents(run)[-1]["policy"] == "rollback"
    assert losses(run) == losses(whole)  # nothing is left out: the batch was not to blame


@pytest.mark.slow
def test_a_spike_is_reported_or_left_out(
    data: Path, tmp_path: Path, before_batch: Callable[..., None]
) -> None:
    for policy in ("report", "rollback"):
        before_batch(25, lambda run, batch: batch.label.mul_(100))
        guard = f"{{spike_factor: 5, on_spike: {policy}}}"
        options = {"train__epochs": 3, "train__checkpoint_every": 5, "train__guard": guard}
        run = train(make_config(data, None, tmp_path / policy, **options))
        (incident,) = incidents(run)
        assert incident["steps"] == [25]
        assert "step 26: loss" in incident["found"]
        assert "most on rank 0" in incident["found"]
        assert incident["policy"] == policy
        assert (26 in losses(run)) == (policy == "report")


def test_rollbacks_are_limited(
    data: Path, tmp_path: Path, before_batch: Callable[..., None]
) -> None:
    for number in (3, 8, 13):  # two more are under way when one is found
        before_batch(number, lambda run, batch: batch.label.fill_(float("inf")))
    guard = "{non_finite: rollback, rollbacks: 2}"
    with pytest.raises(
        InputError, match="loss is not finite in the batch of rank 0; no checkpoint"
    ):
        train(make_config(data, None, tmp_path / "run", train__guard=guard))
    assert [one["policy"] for one in incidents(tmp_path / "run")] == ["rollback"] * 2 + ["stop"]


def test_skip_keeps_tables_and_dense_parameters_finite(
    data: Path, tmp_path: Path, before_batch: Callable[..., None]
) -> None:
    before_batch(4, lambda run, batch: batch.label.fill_(float("inf")))
    seen: list[Run] = []
    before_batch(8, lambda run, batch: seen.append(run))
    run = train(make_config(data, None, tmp_path / "run", train__guard="{non_finite: skip}"))
    assert [one["steps"] for one in incidents(run)] == [[4]]
    for name, value in seen[0].model.state_dict().items():
        whole = value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        assert torch.isfinite(whole).all(), name


def test_no_lookup_takes_what_is_not_finite() -> None:
    """Pooled, weighted, items and histories, and sequences of every further width."""
    values = [torch.ones(2, 4, requires_grad=True) for _ in range(4)]
    jagged = [JaggedTensor(value, lengths=torch.tensor([1, 1])) for value in values[2:]]
    pooled, weighted = (KeyedTensor(["a"], [4], value) for value in values[:2])
    with torch.enable_grad():
        keep_from_tables(
            torch.nn.Identity(),
            (pooled, {"item": jagged[0]}, None, None, weighted, [{"feature_tag": jagged[1]}]),
        )
    for bad in (math.nan, math.inf, 1.0):
        for value in values:
            value.grad = None
            (value * torch.tensor([bad, 1.0, 1.0, 1.0])).sum().backward()
            expected = torch.ones(2, 4) if bad == 1.0 else torch.zeros(2, 4)
            assert torch.equal(value.grad, expected)
