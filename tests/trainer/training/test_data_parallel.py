"""Data-parallel tables learn what sharded ones learn, and what a device cannot do is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embeddings.optimizer import TableOptimizer, fuse_optimizer
from embeddings.placement import Placement, PlanError, check_groups, check_placement
from embeddings.sharding import Hardware, describe_plan, make_planner, sharders
from embeddings.tables import Table, collections
from llm_knowledge.errors import InputError
from tests.drills.replicated_steps import RANKS, RULES
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs
from trainer.training.loop import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("data-parallel"))


@pytest.mark.distributed
def test_sharded_and_replicated_tables_learn_the_same(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Same rows after the same steps, with every rule, through checkpoints in both directions."""
    command = [sys.executable, "-m", "tests.drills.replicated_steps", inputs[0].parent, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (np.load(tmp_path / f"rank-{rank}.npz") for rank in range(RANKS))
    for rule in RULES:
        for name in (name for name in first.files if name.startswith(f"{rule} ")):
            assert np.array_equal(first[name], second[name]), name  # replicas stay equal
            if rule == "rowwise_adagrad" and name.endswith("column_wise again 6"):
                continue  # one accumulator per part of a row is another rule
            expected = first[f"{rule} row_wise {name[-1]}"]
            np.testing.assert_allclose(first[name], expected, rtol=1e-5, atol=1e-8, err_msg=name)
        moved = np.abs(first[f"{rule} row_wise 6"] - first[f"{rule} row_wise 4"]).max()
        assert moved > 1e-6


@pytest.mark.slow
def test_a_run_with_replicated_tables(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    sharding = "{user: data_parallel, user_knowledge: data_parallel, item_knowledge: row_wise}"
    config = make_config(*inputs, tmp_path / "run", tables__sharding=sharding, train__epochs=1)
    plan = {
        table["table"]: table for table in json.loads((train(config) / "plan.json").read_text())
    }
    assert plan["user"]["sharding"] == plan["user_knowledge"]["sharding"] == "data_parallel"
    assert plan["user"]["kernel"] == "dense"
    assert plan["user_knowledge"]["bytes_per_rank"] == [40 * 8 * 2]  # rows x dim x float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tables__sharding": "{item: data_parallel}"},
            "sharding of item: a data_parallel table of",
        ),
        ({"hardware__sharding_group_size": "2"}, "sharding_group_size: 2: groups .* need GPUs"),
        ({"tables__kernels": "{user: uvm}"}, "kernel uvm of table user needs a GPU"),
        (
            {"tables__kernels": "{item_knowledge: uvm_caching}"},
            "kernel uvm_caching of table item_know",
        ),
        (
            {"tables__kernels": "{user: key_value}", "tables__key_value_directory": "/ssd"},
            "kernel key_value of table user needs a GPU",
        ),
    ],
)
def test_refused_on_a_cpu_before_anything_is_written(
    inputs: tuple[Path, Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(make_config(*inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_a_gpu_can_do() -> None:
    for kernel in ("uvm", "uvm_caching", "key_value"):
        check_placement("user", False, Placement(kernel=kernel), "cuda")
    check_placement("item", True, Placement("data_parallel"), "cuda")
    with pytest.raises(PlanError, match="lies in the device's memory"):
        check_placement("user", False, Placement("data_parallel", "uvm"), "cuda")
    with pytest.raises(PlanError, match="are trained by sgd, adagrad or rowwise_adagrad"):
        check_placement("user", False, Placement("data_parallel", replicable=False), "cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables__kernels": "{user: key_value}"}, "key_value_directory belongs to key_value"),
        ({"tables__key_value_directory": "/ssd"}, "key_value_directory belongs to key_value"),
        ({"tables__kernels": "{users: uvm}"}, r"tables.kernels.users"),
        ({"tables__sharding": "{users: row_wise}"}, r"tables.sharding.users"),
        (
            {
                "tables__kernels": "{user_knowledge: key_value}",
                "tables__key_value_directory": "/ssd",
            },
            "a frozen table has no optimizer",
        ),
        (
            {
                "tables__kernels": "{user: key_value}",
                "tables__key_value_directory": "/ssd",
                "tables__optimizer": "sgd",
            },
            "need optimizer rowwise_adagrad, not sgd",
        ),
    ],
)
def test_impossible_kernels(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_config(tmp_path / "data", tmp_path / "stores", tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("size", "optimizer", "kernel", "message"),
    [
        (16, "sgd", "fused", "must divide the 16 ranks into two groups or more"),
        (5, "sgd", "fused", "must divide the 16 ranks"),
        (8, "adam", "fused", "copies of adam's state cannot be averaged; choose sgd, adagrad or"),
        (8, "sgd", "key_value", "copies of key_value tables are not averaged"),
    ],
)
def test_impossible_groups(size: int, optimizer: str, kernel: str, message: str) -> None:
    for fine in (2, 4, 8):
        check_groups(fine, 16, 4, "cuda", "rowwise_adagrad", {"fused", "uvm"})
    with pytest.raises(PlanError, match=message):
        check_groups(size, 16, 4, "cuda", optimizer, {kernel})
    with pytest.raises(PlanError, match="a group is whole hosts or an even part of one"):
        check_groups(6, 24, 4, "cuda", "sgd", set())


@pytest.mark.parametrize(
    ("device", "replicable", "sharding"),
    [("cuda", True, "data_parallel"), ("cuda", False, "row_wise"), ("cpu", True, "row_wise")],
)
def test_the_planner_chooses_replicas_where_they_can_be(
    device: str, replicable: bool, sharding: str
) -> None:
    """A tiny table with many ids, slow links: copies are best, unless device or optimizer lack them."""
    table = Table("t", 100, 16, ("f",), sequence=True, ids_per_sample=(50,))
    gib = 2**30
    hardware = Hardware(2, 4, device, 80 * gib, 512 * gib, 3e12, 3e11, 4e11, 5e9, 0.1)
    model = collections([table])
    fuse_optimizer(model.parameters(), TableOptimizer("sgd", 0.1))
    placements = {"t": Placement("planner", replicable=replicable)}
    planner = make_planner([table], placements, 4096, hardware)
    plan = describe_plan(planner.plan(model, sharders(model)), [table], hardware.ranks)
    assert [one.sharding for one in plan] == [sharding]
    if sharding == "data_parallel":
        assert plan[0].bytes_per_rank == [100 * 16 * 4] * 8


def test_a_table_smaller_than_the_ranks_is_not_cut_by_rows() -> None:
    tables = [Table("tiny", 3, 8, ("f",)), Table("large", 40, 8, ("g",))]
    gib = 2**30
    hardware = Hardware(1, 4, "cpu", 0, 64 * gib, 3e12, 3e11, 4e11, 5e9, 0.1)
    model = collections(tables)
    fuse_optimizer(model.parameters(), TableOptimizer("sgd", 0.1))
    plan = make_planner(tables, {}, 16, hardware).plan(model, sharders(model))
    found = {one.table: one.sharding for one in describe_plan(plan, tables, 4)}
    assert found == {"tiny": "table_wise", "large": "row_wise"}
    with pytest.raises(PlanError, match=r"tiny has 3 rows, fewer than 4 ranks.*use table_wise"):
        make_planner(tables, {"tiny": Placement("row_wise")}, 16, hardware)
