"""Plans for clusters that are not there: bytes per rank by hand, what is short, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embeddings.placement import Placement
from embeddings.planning.capacity import enough_hosts, least_deficit, needed_and_available
from embeddings.planning.memory import plan_memory
from embeddings.sharding import Hardware, Piece, TablePlan
from embeddings.tables import Table
from launch.main import main
from tests.helpers.training_data import make_config, make_inputs, write_config

GIB = 2**30
TABLES = """
tables:
  - {name: id, count: 8, rows: 100_000_000, dim: 64}
  - {name: history, rows: 10_000_000, dim: 64, kind: sequence, ids_per_sample: [1, 20]}
  - {name: texts, rows: 20_000_000, dim: 384, dtype: float16, frozen: true}
sharding: {id_0: table_wise, id_1: column_wise, id_2: row_wise, id_3: table_row_wise, history: row_wise,
  texts: row_wise}
batch_per_rank: 1024
dense_parameters: 1_000_000
"""


def hardware(hosts: int = 8, per_host: int = 8, gib: int = 80) -> Hardware:
    return Hardware(
        hosts, per_host, "cuda", gib * GIB, 2048 * GIB, 3e12, 3e11, 4e11, 5e10, reserved=0.0
    )


def write(tmp_path: Path, text: str = TABLES) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text(text)
    return path


def plan(path: Path, *words: str, nodes: int = 8) -> int:
    cluster = ["--nodes", str(nodes), "--gpus-per-node", "8"]
    return main(["plan", "--tables", str(path), *cluster, *words])


def test_sixty_four_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert plan(write(tmp_path), "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "the library's guess" in text
    assert "memory per rank (68.00 GiB usable" in text
    found = json.loads(out.read_text())
    assert found["fits"] is True
    tables = {table["table"]: table for table in found["tables"]}
    assert len(tables) == 10
    wanted = {"id_0": "table_wise", "id_1": "column_wise", "id_2": "row_wise", "texts": "row_wise"}
    assert {name: tables[name]["sharding"] for name in wanted} == wanted
    for table in tables.values():  # every value of every table lies somewhere, once
        cells = sum(piece["rows"] * piece["columns"] for piece in table["pieces"])
        assert cells == table["rows"] * table["dim"]
    memory = {name: np.array(sizes) for name, sizes in found["memory_bytes_per_rank"].items()}
    assert memory["tables"].sum() == (8 * 10**8 + 10**7) * 64 * 4
    assert memory["frozen"].sum() == 2 * 10**7 * 384 * 2
    assert memory["dense"].tolist() == [16 * 10**6] * 64
    wire = found["wire_bytes_per_step"]
    # Frozen vectors go out and no gradient comes back; everything else does both ways.
    frozen = 64 * 63 * 1024 * 384 * 4
    sent = {name: link["intra_host"] + link["inter_host"] for name, link in wire.items()}
    assert sent["output"] - sent["backward"] == pytest.approx(frozen)
    assert sent["dense"] == pytest.approx(2 * 63 * 4 * 10**6)


def test_memory_by_hand() -> None:
    """Two ranks, batch 10: one row-wise table of 8 x 4 with two ids per sample, cut 4 + 4."""
    table = Table("t", 8, 4, ("f",), ids_per_sample=(2,))
    pieces = [Piece(0, 0, 0, 4, 4), Piece(1, 4, 0, 4, 4)]
    plans = [TablePlan("t", "row_wise", "fused", 8, 4, [64, 64], pieces)]
    found = plan_memory([table], plans, {}, "rowwise_adagrad", 10, 2)
    assert found.tables.tolist() == [64, 64]  # 4 rows x 4 values x 4 bytes
    assert found.optimizer.tolist() == [16, 16]  # 4 bytes a row
    # Of 20 samples: a length each and one of two ids, for two batches; a partial sum and its gradient.
    # Of the rank's own 10: a vector and its gradient.
    received, looked_up, own = 20 * (8 + 8) * 2, 20 * 16 * 2, 10 * 16 * 2
    assert found.activations.tolist() == [received + looked_up + own] * 2
    adagrad = plan_memory([table], plans, {}, "adagrad", 10, 2)
    assert adagrad.optimizer.tolist() == [64, 64]
    frozen = plan_memory([replace(table, frozen=True)], plans, {}, "adagrad", 10, 2)
    assert (frozen.tables.sum(), frozen.optimizer.sum(), frozen.frozen.sum()) == (0, 0, 128)
    cached = {"t": Placement(kernel="uvm_caching", cache_load_factor=0.25)}
    moved = plan_memory([table], plans, cached, "adagrad", 10, 2)
    assert moved.tables.tolist() == [16, 16]
    assert moved.host.tolist() == [128, 128]


def test_shortage_and_hosts() -> None:
    tables = [Table(f"t{i}", 10**8, 64, (f"f{i}",)) for i in range(4)]
    small = hardware(hosts=1, per_host=2, gib=40)
    needed, available = needed_and_available(tables, {}, "rowwise_adagrad", small)
    assert needed == 4 * 10**8 * (64 * 4 + 4)
    assert available == 80 * GIB
    missing = least_deficit(tables, {}, "rowwise_adagrad", 1, small)
    assert missing == pytest.approx(needed / 2 - 40 * GIB, rel=1e-6)  # row-wise: an even half
    hosts = enough_hosts(tables, {}, "rowwise_adagrad", 1, small)
    assert hosts == 2  # 97 GiB on 4 x 40 GiB
    assert least_deficit(tables, {}, "rowwise_adagrad", 1, replace(small, hosts=hosts)) <= 0
    packed = {table.name: Placement("table_wise") for table in tables}
    assert enough_hosts(tables, packed, "rowwise_adagrad", 1, small) == 2
    huge = [replace(tables[0], rows=10**10)]
    whole = {"t0": Placement("table_wise")}
    assert enough_hosts(huge, whole, "sgd", 1, small) is None  # no rank is larger on more hosts


def test_too_much_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.planning.plan

    monkeypatch.setattr(trainer.planning.plan, "make_planner", None)  # no search is needed to know
    text = TABLES.replace("100_000_000", "4_000_000_000").replace("sharding:", "sharding: {}\n#")
    text = text.replace("\n  texts: row_wise}", "")
    out = tmp_path / "plan.json"
    assert plan(write(tmp_path, text), "--out", str(out)) == 2
    message = capsys.readouterr().err
    needed = 8 * 4 * 10**9 * (64 * 4 + 4) + 10**7 * (64 * 4 + 4) + 2 * 10**7 * 384 * 2
    available = 64 * 80 * GIB * 0.85
    assert f"{(needed - available) / 2**40:,.2f} TiB short in total" in message
    assert "the worst rank lacks" in message
    assert "float16 rows for all tables: fits" in message
    assert "ranks (" in message
    assert not out.exists()


def test_an_unplaceable_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TABLES.replace("count: 8, rows: 100_000_000", "count: 8, rows: 400_000_000")
    assert plan(write(tmp_path, text)) == 2
    message = capsys.readouterr().err
    assert "enough in total" in message
    missing = 4 * 10**8 * (64 * 4 + 4) - 68 * GIB
    found = float(message.split("the worst rank lacks ")[1].split(" GiB")[0])
    assert found == pytest.approx(missing / GIB, abs=3)  # plus ids, vectors and the other tables
    assert "row_wise for 4 tables (id_0, id_1, id_3, …): fits" in message or (
        "row_wise for tables id_0, id_1, id_3: fits" in message
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "id_0: table_wise",
            "idd: table_wise",
            "sharding.idd: there is no such table; known: history, id, texts",
        ),
        ("id_0: table_wise", "id_0: tablewise", "sharding.id_0: Input should be 'row_wise'"),
        ("history: row_wise", "history: grid_shard", "is not possible for a table of sequences"),
        ("dim: 64}", "dim: 65}", "tables.0.dim: Input should be a multiple of 4"),
        ("name: history", "name: id_1", "there are two tables id_1"),
        ("name: history", "name: items", "no room for a table named items"),
        ("rows: 100_000_000", "rows: many", "tables.0.rows: Input should be a valid integer"),
        ("batch_per_rank: 1024", "batch: 1024", "batch_per_rank: Field required"),
        (
            "kind: sequence",
            "kind: pooled, kernel: uvvm",
            "tables.1.kernel: Input should be 'fused'",
        ),
    ],
)
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    assert old in TABLES
    assert plan(write(tmp_path, TABLES.replace(old, new))) == 2
    assert message in capsys.readouterr().err


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert plan(path, nodes=0) == 2
    assert "--nodes 0: must be greater than 0" in capsys.readouterr().err
    assert plan(tmp_path / "none.yaml") == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    write(tmp_path, "{tables: [{name: t, rows: 9, dim: 4, kernel: uvm}], batch_per_rank: 1}")
    assert plan(path, "--device", "cpu") == 2
    assert "kernel uvm of table t needs a GPU" in capsys.readouterr().err


def test_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's own tables and dense parameters, for GPUs that this machine has not."""
    data, stores = make_inputs(tmp_path)
    kernels = "{user: uvm_caching, user_knowledge: uvm}"
    config = make_config(data, stores, tmp_path / "run", tables__kernels=kernels)
    out = tmp_path / "plan.json"
    words = ["--nodes", "2", "--gpus-per-node", "4", "--hbm-gib", "16", "--out", str(out)]
    path = write_config(config, tmp_path / "config.yaml")
    assert main(["plan", "--config", str(path), *words]) == 0
    found = json.loads(out.read_text())
    kernels_found = {table["table"]: table["kernel"] for table in found["tables"]}
    assert kernels_found["user"] == "fused_uvm_caching"
    assert kernels_found["user_knowledge"] == "fused_uvm"
    assert found["batch_per_rank"] == 8  # 64 samples on 8 ranks
    assert found["hardware"]["device_memory"] == 16 * GIB
    assert sum(found["memory_bytes_per_rank"]["host"]) > 0
    assert found["memory_bytes_per_rank"]["dense"][0] > 0
    assert not (tmp_path / "run").exists()


def test_groups_with_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of two hosts holds everything: nothing but the averages travels between them."""
    text = """
tables: [{name: id, count: 2, rows: 1_000_000, dim: 32}]
sharding: {id: row_wise}
batch_per_rank: 64
hardware: {sharding_group_size: 8}
"""
    out = tmp_path / "plan.json"
    assert plan(write(tmp_path, text), "--out", str(out), nodes=2) == 0
    found = json.loads(out.read_text())
    assert found["copies"] == 2
    assert found["hardware"]["hosts"] == 1
    assert found["wire_bytes_per_step"]["output"]["inter_host"] == 0
    rows_and_state = 2 * 10**6 * (32 * 4 + 4)
    assert sum(found["copies_bytes_sent_per_step_and_rank"]) == pytest.approx(rows_and_state)
    assert plan(write(tmp_path, text), "--device", "cpu", nodes=2) == 2
    assert "groups with copies need GPUs" in capsys.readouterr().err
