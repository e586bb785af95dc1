"""Planted effects on a small log: two kinds are learnt; all of them say what they should of their rows."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.planted import EFFECTS, columns_of, plant, prepared, raw_columns, trained_auc

ROWS = 6_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("planted") / "base", raw_columns(ROWS, 0), 0)


def test_every_effect_differs_from_row_to_row(base: Path) -> None:
    rows = columns_of(base, "train", "test")
    for name, effect in EFFECTS.items():
        logit = effect.logit(rows)
        assert len(logit) == len(rows["feature_row"]), name
        assert np.isfinite(logit).all(), name
        assert logit.std() > 0.05, name
    tiers = np.array([-1 if tier is None else tier for tier in rows["feature_tier"]])
    assert set(tiers.tolist()) == {-1, *range(6)}  # before the third day nobody has one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table as of a date", "counter"])
def test_an_effect_is_learnt_with_its_feature(base: Path, tmp_path: Path, name: str) -> None:
    data, best = plant(tmp_path, name, base, raw_columns(ROWS, 0), 0)
    assert best > 0.75
    scored = trained_auc(data, tmp_path / "run", EFFECTS[name].use, 0, 5)
    assert scored > best - 0.03
