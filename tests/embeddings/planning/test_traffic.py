"""Predicted bytes on the wire are the counted ones."""

import json
import subprocess
import sys

import numpy as np
import pytest
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from embeddings.planning.traffic import by_link, plan_traffic
from embeddings.sharding import Piece, TablePlan, check_plan
from embeddings.tables import Table
from tests.trainer.training.test_train import ENVIRONMENT, ROOT


@pytest.mark.slow
@pytest.mark.distributed
def test_predicted_bytes_are_the_counted_ones() -> None:
    """Four gloo ranks as two hosts of two: every sharding, stage by stage and pair by pair, exactly."""
    command = [sys.executable, "-m", "tests.drills.traffic_count"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 11
    for case in cases:
        for stage, counted in case["counted"].items():
            predicted = case["predicted"][stage]
            assert np.allclose(counted, predicted, atol=1e-6), (case["case"], stage)
        # Sums within a host have tensors in between, and replicas exchange none: not counted so.
        if case["case"].split()[1] in ("row_wise", "table_wise", "column_wise"):
            held = case["held"]
            assert np.allclose(held["counted"], held["predicted"], atol=1e-6), case["case"]
        moved = "gradients" if case["case"].endswith("data_parallel") else "output"
        assert np.sum(case["counted"][moved]) > 0
        frozen = case["case"].startswith("frozen")
        assert (np.sum(case["counted"]["backward"]) == 0) == (frozen or moved == "gradients")


def test_by_hand() -> None:
    """Two hosts of one: one row-wise table of 10 rows x 4, cut 6 + 4, two ids per sample, batch 5."""
    table = Table("t", 10, 4, ("f",), ids_per_sample=(2,))
    pieces = [Piece(0, 0, 0, 6, 4), Piece(1, 6, 0, 4, 4)]
    plan = TablePlan("t", "row_wise", "fused", 10, 4, [96, 64], pieces)
    traffic = plan_traffic([table], [plan], batch=5, ranks=2, hosts=2)
    to_first, to_second = 5 * (8 + 2 * 8 * 0.6), 5 * (8 + 2 * 8 * 0.4)
    assert traffic.input == pytest.approx(np.array([[0, to_second], [to_first, 0]]))
    assert traffic.output == pytest.approx(np.array([[0, 80], [80, 0]]))  # 5 samples x 4 floats
    assert np.array_equal(traffic.backward, traffic.output)
    assert by_link(traffic.total, hosts=2) == pytest.approx((0, to_first + to_second + 4 * 80))
    assert by_link(traffic.total, hosts=1) == pytest.approx((to_first + to_second + 4 * 80, 0))


def test_a_plan_that_leaves_something_out() -> None:
    tables = [Table("t", 10, 4, ("t",)), Table("u", 10, 4, ("u",))]

    def plan(*rows: tuple[int, int]) -> ShardingPlan:
        spec = EnumerableShardingSpec(
            [
                ShardMetadata([row, 0], [count, 4], f"rank:{i}/cpu")
                for i, (row, count) in enumerate(rows)
            ]
        )
        parameter = ParameterSharding("row_wise", "fused", sharding_spec=spec)
        return ShardingPlan({"m": EmbeddingModuleShardingPlan({"t": parameter})})

    check_plan(plan((0, 6), (6, 4)), tables[:1])
    with pytest.raises(RuntimeError, match=r"placed tables \['t'\], expected \['t', 'u'\]"):
        check_plan(plan((0, 6), (6, 4)), tables)
    with pytest.raises(RuntimeError, match="placed 24 values of table t, which has 10 x 4"):
        check_plan(plan((0, 6)), tables[:1])
