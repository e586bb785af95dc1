"""The profiler's correctness mode, its bytes and sums, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest

from embeddings.profiling.measure import data_sheet_bandwidth
from embeddings.profiling.measure_tables import COLLECTIONS, SHARDINGS, sweep
from embeddings.profiling.report import text_of
from launch.main import main
from tests.drills.profile_cells import SMALL
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config

IMPOSSIBLE = {
    ("sequence", "table_row_wise"),
    ("sequence", "grid_shard"),
    ("sequence", "data_parallel"),
}


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L4", None),
        (None, None),
    ],
)
def test_bandwidth_of_the_data_sheet(gpu, rate):
    assert data_sheet_bandwidth(gpu) == rate


def test_what_bytes_alone_would_take_is_printed_beside_what_was_measured(found):
    report = json.loads(json.dumps(found["full"]))
    cell = report["cells"][0]
    lookup = cell["phases"]["lookup"]
    assert lookup["data_sheet_ms"] is None  # of a CPU
    lookup |= {"data_sheet_ms": 0.125, "ms": {"median": 0.5, "low": 0.4, "high": 0.6}}
    head, row = (
        next(line.split() for line in text_of(report).splitlines() if line.strip().startswith(name))
        for name in ("phase ", "lookup ")
    )
    assert head[:5] == ["phase", "ms", "by", "data", "sheet"]
    assert row[1:4] == ["0.50", "(0.40-0.60)", "0.125"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    subprocess.run(
        [sys.executable, "-m", "tests.drills.profile_cells", str(root)],
        check=True,
        timeout=180,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    alone = json.loads((root / "alone.json").read_text())["all"]
    return {"root": root, "alone": alone} | json.loads((root / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("collection", COLLECTIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("ranks", ["all", "alone"])
def test_every_cell_equals_unsharded_tables(found, ranks, sharding, collection):
    cells = [
        one
        for one in found[ranks]["cells"]
        if (one["cell"]["sharding"], one["cell"]["collection"]) == (sharding, collection)
    ]
    assert {one["cell"]["optimizer"] for one in cells} == {"sgd", "adagrad", "rowwise_adagrad"}
    for one in cells:
        if (collection, sharding) in IMPOSSIBLE:
            assert "not possible" in one["impossible"] or "needs a GPU" in one["impossible"]
        else:
            assert one["wrong"] == []


@pytest.mark.distributed
def test_nothing_travels_on_one_rank(found):
    phases = [one["phases"] for one in found["alone"]["cells"] if "phases" in one]
    assert len(phases) == 27
    assert all(phase["link_bytes"] == 0 for one in phases for phase in one.values())


@pytest.mark.distributed
def test_a_wrong_reference_is_found_out(found):
    for one in found["WrongRows"]["cells"]:
        assert any("output" in line for line in one["wrong"])
        assert any("rows of table table_1: 1 of" in line for line in one["wrong"])
    for one in found["WrongRule"]["cells"]:
        assert any(line.startswith("step 0: rows of table") for line in one["wrong"])
        assert not any(line.startswith("step 0: output") for line in one["wrong"])


@pytest.mark.distributed
def test_report_is_consistent(found):
    report = found["full"]
    assert report["ranks"] == 2
    assert report["rounds"] == 5
    assert report["copy_bandwidth"] > 1e8
    assert {"torch", "torchrec"} <= set(report["versions"])
    for one in report["cells"]:
        assert list(one["phases"]) == [
            "input distribution",
            "lookup",
            "output distribution",
            "backward with update",
        ]
        parts = [phase["each_ms"] for phase in one["phases"].values()]
        assert [len(part) for part in parts] == [5] * 4
        sums = [sum(values) for values in zip(*parts, strict=True)]
        assert one["sum_of_phases"]["each_ms"] == pytest.approx(sums)
        ratio = [a / b for a, b in zip(sums, one["step"]["each_ms"], strict=True)]
        middle = one["sum_of_phases_over_step"]["time"]["median"]
        assert middle == pytest.approx(sorted(ratio)[2])
        for phase in one["phases"].values():
            assert 0 < phase["ms"]["low"] <= phase["ms"]["median"] <= phase["ms"]["high"]
            moved = phase["memory_bytes"] / (phase["ms"]["median"] / 1e3)
            assert phase["share_of_copy_bandwidth"] == pytest.approx(
                moved / report["copy_bandwidth"]
            )
            assert (phase["share_of_link_bandwidth"] is None) == (phase["link_bytes"] == 0)
        assert one["step"]["ms"]["median"] > one["forward"]["ms"]["median"]
        assert set(one["baselines"]) == {"embedding_bag", "fbgemm"}
        assert {arm["rule"] for arm in one["baselines"].values()} == {"sgd"}
        seconds = one["step"]["ms"]["median"] / 1e3
        assert one["samples_per_second"] == pytest.approx(16 / seconds)


@pytest.mark.distributed
def test_counted_bytes_follow_from_the_sizes(found):
    by_name = {
        (one["cell"]["collection"], one["cell"]["sharding"]): one["phases"]
        for one in found["all"]["cells"]
        if "phases" in one and one["cell"]["optimizer"] == "sgd"
    }
    batch, tables, dim = 8, 3, 16
    outputs = batch * tables * dim * 4  # float32, of one rank
    pooled = by_name["pooled", "row_wise"]
    assert pooled["lookup"]["link_bytes"] == 0
    # Each rank holds partial sums of both ranks' samples, and hands on those of the other.
    assert pooled["output distribution"]["link_bytes"] == outputs
    assert pooled["backward with update"]["link_bytes"] == outputs
    replicated = by_name["pooled", "data_parallel"]
    assert replicated["input distribution"]["link_bytes"] == 0
    assert replicated["backward with update"]["link_bytes"] == tables * 101 * dim * 4
    trace = json.loads((found["root"] / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"input distribution", "lookup", "output distribution", "whole step"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sharding", "diagonal"], "sharding 'diagonal': use one of row_wise"),
        (["--kernel", "uvm"], "kernel uvm of table table_0 needs a GPU"),
        (["--dim", "6"], "dim 6: the kernels need a multiple of 4"),
        (["--tables", "0"], "tables 0: at least 1 is needed"),
        (["--rounds", "1"], "--rounds 1: at least 2"),
        (["--plots"], "--plots needs --out"),
        (["--collection", "sequence", "--sharding", "grid_shard"], "grid_shard is not possible"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments_are_refused(capsys, words, message):
    assert main(["profile", "embeddings", *words]) == 2
    assert message in capsys.readouterr().err


def test_sweep_is_every_combination():
    cells = sweep(**SMALL | {"dim": [16, 32]}, sharding=["row_wise", "table_wise"])
    assert [(one.dim, one.sharding) for one in cells] == [
        (16, "row_wise"),
        (16, "table_wise"),
        (32, "row_wise"),
        (32, "table_wise"),
    ]


@pytest.mark.slow
def test_configured_model(tmp_path, capsys):
    make_inputs(tmp_path / "inputs")
    config = make_config(tmp_path / "inputs/data", tmp_path / "inputs/knowledge", tmp_path / "run")
    file = write_config(config, tmp_path / "config.yaml")
    out = tmp_path / "out"
    words = ["profile", "embeddings", "--config", str(file), "--check", "--rounds", "2", "--plots"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("correct: outputs and updated rows equal") == 3
    report = json.loads((out / "report.json").read_text())
    frozen = [one for one in report["cells"] if one["rule"] is None]
    assert len(frozen) == 1
    assert "backward with update" not in frozen[0]["phases"]
    assert (out / "phases.png").stat().st_size > 10_000
    assert (out / "baselines.png").stat().st_size > 10_000
    assert not (tmp_path / "run").exists()
