"""Learning rates over a run: warm-up, then constant, linear or cosine; dense, meta and fused tables."""

import math

from embeddings.optimizer import set_table_learning_rate
from trainer.config.tables import ScheduleConfig
from trainer.run.session import Run


def share_of_peak(schedule: ScheduleConfig, step: int, total: int) -> float:
    """The learning rate of one update as a share of its peak.

    Args:
        schedule: Its shape.
        step: Updates done before this one, from 0.
        total: Updates of the whole run, if nothing stops it early.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    done = min((step - schedule.warmup_steps) / max(total - schedule.warmup_steps, 1), 1.0)
    if schedule.shape == "constant":
        return 1.0
    left = 1.0 - done if schedule.shape == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return schedule.final + (1 - schedule.final) * left


def set_learning_rates(run: Run, step: int, total: int) -> dict[str, float]:
    """Sets every learning rate for the next update.

    A function of the step alone, so a run that was resumed has the rates of one that was not.

    Args:
        run: The run.
        step: Updates done so far.
        total: Updates of the whole run.

    Returns:
        `learning_rate` (dense), `table_learning_rate` and, if the model has such parts,
        `meta_learning_rate` and `knowledge_learning_rate`.
    """
    train, tables = run.config.train, run.config.tables
    meta_share = share_of_peak(train.meta_schedule, step, total)
    rates = {
        "dense": train.learning_rate * share_of_peak(train.schedule, step, total),
        "meta": train.meta_learning_rate * meta_share,
        "knowledge": (train.knowledge_learning_rate or train.meta_learning_rate) * meta_share,
        "tables": tables.learning_rate * share_of_peak(tables.schedule, step, total),
    }
    shown = {}
    for group in run.optimizer.param_groups:
        group["lr"] = rates[group["name"]]
        prefix = "" if group["name"] == "dense" else f"{group['name']}_"
        shown[f"{prefix}learning_rate"] = group["lr"]
    set_table_learning_rate(run.model, rates["tables"])
    return shown | {"table_learning_rate": rates["tables"]}
