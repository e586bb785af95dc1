"""The training profiler: its serial step trains as training does, its figures add up."""

import json

import pytest
import torch

from embeddings.profiling.measure import Clock
from launch.main import main
from tests.helpers.training_data import make_config, make_inputs, write_config
from trainer.distributed.process_group import distributed, seed_step
from trainer.profiling.embeddings import scratch_run
from trainer.profiling.train_phases import COMPUTE, PHASES, SerialStep


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_serial_step_trains_as_the_pipeline_does(inputs, tmp_path):
    config = make_config(*inputs, tmp_path / "run")
    after = []
    for serial in (False, True):
        with distributed(60) as runtime, scratch_run(config, runtime) as run:
            run.model.train()
            batches = list(run.stream(["train"], shuffle=True).batches())[:1]
            before = {k: v.clone() for k, v in run.model.module.dense.named_parameters()}
            seed_step(0, 0, 0)
            if serial:
                found = SerialStep(run, Clock(runtime.device))(iter(batches))
                assert set(PHASES) <= set(found)
            else:
                run.pipeline.progress(iter(batches))
            state = {k: v.detach().clone() for k, v in run.model.module.dense.named_parameters()}
            assert any(not torch.equal(before[name], state[name]) for name in state)
            for name, value in run.model.state_dict().items():
                if name.startswith("sparse."):
                    state[name] = value.local_shards()[0].tensor.clone()
            after.append(state)
    assert set(after[0]) == set(after[1])
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.distributed
def test_profile_train_on_two_ranks(inputs, tmp_path, capfd):
    config = make_config(*inputs, tmp_path / "run")
    file, out = write_config(config, tmp_path / "config.yaml"), tmp_path / "out"
    words = [
        "profile",
        "train",
        "--config",
        str(file),
        "--rounds",
        "2",
        "--warmup",
        "1",
        "--out",
        str(out),
        "--plots",
        "--trace",
        str(out / "trace.json"),
        "--processes",
        "2",
    ]
    assert main(words) == 0
    assert "loader in" in capfd.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["ranks"] == 2
    assert report["serial_step"] == pytest.approx(
        sum(report["phases"][name]["median"] for name in PHASES)
    )
    assert report["compute"] == pytest.approx(
        sum(report["phases"][name]["median"] for name in COMPUTE)
    )
    exposed = max(report["step"]["median"] - report["compute"], 0)
    assert report["exposed_communication"] == pytest.approx(exposed)
    assert all(report["phases"][name]["median"] > 0 for name in (*PHASES, *report["meta"]))
    out_rate = report["samples_per_second"]["loader out"]["median"]
    assert out_rate == pytest.approx(
        1e3 * report["global_batch_size"] / report["step"]["median"], rel=0.01
    )
    assert (out / "train.png").stat().st_size > 10_000
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "nowhere.yaml", "--rounds", "0"], "--rounds 0: at least 2"),
        (["--config", "nowhere.yaml", "--warmup", "-1"], "--warmup -1: must not be negative"),
    ],
)
def test_bad_arguments_are_refused(capsys, words, message):
    assert main(["profile", "train", *words]) == 2
    assert message in capsys.readouterr().err
