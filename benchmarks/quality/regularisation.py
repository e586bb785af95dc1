"""Is it the regularisation? Every arm tries the same variations of it, besides its step sizes.

A variation is trained with the first seed and the step sizes that the study's trials chose for the arm;
if it is better on the valid split than the arm as the study has it, the further seeds follow.
"""

from pathlib import Path
from typing import Any

from benchmarks.quality.arms import REGULARISATION, REGULARISED, SEEDS
from benchmarks.quality.study import assignments, best_trial, valid_auc

UNCHANGED = "as in the study"


def trials(work: Path, name: str, backbone: str, arm: str) -> list[tuple[Path, list[str]]]:
    """Run directory and assignments of every variation with seed 0."""
    return [_run(work, name, backbone, arm, variation, 0) for variation in REGULARISATION]


def _run(
    work: Path, name: str, backbone: str, arm: str, variation: str, seed: int
) -> tuple[Path, list[str]]:
    words = variation.replace(" ", "-").replace(".", "0.")
    run = work / name / "regularisation" / backbone / arm / words / f"seed-{seed}"
    changes = {**best_trial(work, name, backbone, arm)[1], **REGULARISATION[variation]}
    return run, assignments(work, name, backbone, arm, seed, run, changes)


def reached(work: Path, name: str, backbone: str, arm: str) -> dict[str, float]:
    """AUC on the valid split of every variation, and of the arm as the study has it, seed 0."""
    found = {UNCHANGED: valid_auc(best_trial(work, name, backbone, arm)[0])}
    for variation, (run, _) in zip(REGULARISATION, trials(work, name, backbone, arm), strict=True):
        found[variation] = valid_auc(run)
    return found


def seeds(work: Path, name: str, backbone: str, arm: str) -> list[tuple[Path, list[str]]]:
    """The further seeds' runs of the best variation; none where the study's own runs are the best."""
    best = _best(reached(work, name, backbone, arm))
    if best == UNCHANGED:
        return []
    return [_run(work, name, backbone, arm, best, seed) for seed in range(1, SEEDS)]


def _best(valid: dict[str, float]) -> str:
    return max(valid, key=lambda variation: valid[variation])


def complete(work: Path, name: str, backbone: str) -> dict[str, dict[str, Any]]:
    """What has been run of a backbone: empty unless every arm has been tuned and evaluated.

    Returns:
        Arm to "valid" (variation to AUC on the valid split), "chosen" (a variation), "before" and
        "runs" (run directories of all seeds, as in the study and of the chosen variation).
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in REGULARISED:
        if not all((run / "summary.json").exists() for run, _ in trials(work, name, backbone, arm)):
            return {}
        valid = reached(work, name, backbone, arm)
        chosen = _best(valid)
        before = [work / name / "runs" / backbone / arm / f"seed-{seed}" for seed in range(SEEDS)]
        runs = before
        if chosen != UNCHANGED:
            runs = [_run(work, name, backbone, arm, chosen, seed)[0] for seed in range(SEEDS)]
        if not all((run / "evaluation.json").exists() for run in (*before, *runs)):
            return {}
        found[arm] = {"valid": valid, "chosen": chosen, "before": before, "runs": runs}
    return found
