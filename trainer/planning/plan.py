"""`llm4msr plan`: where tables would lie on a cluster that is not there, and whether they fit.

Bytes are this project's formulas (`embeddings/planning`). Where tables lie is
torchrec's planner's choice; its milliseconds are a guess from constants and are called one.
"""

import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from torch import nn
from torchrec.distributed.planner.types import PlannerError

from embeddings.optimizer import TableOptimizer, fuse_optimizer
from embeddings.placement import PlanError, check_placement
from embeddings.planning.capacity import least_deficit, needed_and_available, suggestions
from embeddings.planning.memory import Memory, deficit, limits, plan_memory
from embeddings.planning.traffic import Traffic, all_reduce, by_link, plan_traffic
from embeddings.sharding import TablePlan, check_plan, describe_plan, make_planner, sharders
from embeddings.tables import collections
from llm_knowledge.errors import InputError
from llm_knowledge.files import write_json
from trainer.planning.problem import Problem

GIB = 2**30
SEARCH_SECONDS = 30
DENSE_BYTES = 16  # per parameter: float32 weight, gradient and two moments of Adam


@dataclass(frozen=True)
class Plan:
    """A plan and what follows from it.

    Attributes:
        tables: Where every table lies.
        memory: Bytes per rank.
        traffic: Bytes per step between ranks that tables are sharded over.
        dense_traffic: Bytes per step of dense gradients between all ranks of the cluster.
        guess_ms: The library's guess of a step's milliseconds at the slowest rank.
        seconds: How long planning took.
    """

    tables: list[TablePlan]
    memory: Memory
    traffic: Traffic
    dense_traffic: np.ndarray
    guess_ms: float
    seconds: float


def plan_absent(problem: Problem, out: Path | None = None) -> Plan:
    """Plans, prints the plan, writes it as JSON.

    Args:
        problem: Tables and cluster.
        out: JSON file to write.

    Raises:
        InputError: If a table cannot be placed as wanted, or not everything fits: what is short, by how
            much, and what would make it fit.
    """
    began = time.perf_counter()
    known = {table.name: table for table in problem.tables}
    try:
        for name, placement in problem.placements.items():
            check_placement(name, known[name].sequence, placement, problem.hardware.device)
    except PlanError as error:
        raise InputError(str(error)) from error
    _refuse_what_is_too_much(problem)
    plan = _search(problem, began)
    text = format_result(problem, plan)
    print(text)
    if out is not None:
        write_plan(problem, plan, out)
    if (missing := deficit(plan.memory, problem.hardware)) > 0:
        raise InputError(explain_shortage(problem, missing))
    return plan


def _refuse_what_is_too_much(problem: Problem) -> None:
    """Adds up before any search: what exceeds the cluster as a whole is refused at once."""
    needed, available = needed_and_available(
        problem.tables, problem.placements, problem.optimizer, problem.hardware
    )
    if needed > available:
        missing = least_deficit(
            problem.tables,
            problem.placements,
            problem.optimizer,
            problem.batch,
            problem.hardware,
        )
        raise InputError(explain_shortage(problem, missing))


def _search(problem: Problem, began: float) -> Plan:
    """Runs torchrec's planner for the absent cluster."""
    hardware, ranks = problem.hardware, problem.hardware.ranks
    model = collections(problem.tables)
    _fuse(model, problem)
    planner = make_planner(
        problem.tables, problem.placements, problem.batch, hardware, SEARCH_SECONDS
    )
    try:
        outcome = planner.plan(model, sharders(model))
    except (
        PlannerError,
        RuntimeError,
        ValueError,
    ) as error:  # the latter two: a table without options
        missing = least_deficit(
            problem.tables, problem.placements, problem.optimizer, problem.batch, hardware
        )
        words = f"torchrec's planner finds no plan: {str(error).strip().splitlines()[0]}"
        raise InputError(f"{words}\n{explain_shortage(problem, missing)}") from error
    check_plan(outcome, problem.tables)
    tables = describe_plan(outcome, problem.tables, ranks)
    best = planner._best_plan or []
    guess = np.zeros(ranks)
    for option in best:
        for shard in option.shards:
            if shard.rank is not None and shard.perf is not None:
                guess[shard.rank] += shard.perf.total
    return Plan(
        tables=tables,
        memory=plan_memory(
            problem.tables, tables, problem.placements, problem.optimizer, problem.batch, ranks
        ),
        traffic=plan_traffic(problem.tables, tables, problem.batch, ranks, hardware.hosts),
        dense_traffic=all_reduce(4 * problem.dense_parameters, problem.cluster.ranks),
        guess_ms=float(guess.max()),
        seconds=time.perf_counter() - began,
    )


def _fuse(model: nn.Module, problem: Problem) -> None:
    """Marks trained tables, so that the library counts their optimizer's state as well."""
    frozen = {table.name for table in problem.tables if table.frozen}
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] not in frozen
    ]
    fuse_optimizer(trained, TableOptimizer(problem.optimizer, 0.1))


def explain_shortage(problem: Problem, missing: float) -> str:
    """What is short, by how much, and what would make it fit."""
    hardware = problem.hardware
    needed, available = needed_and_available(
        problem.tables, problem.placements, problem.optimizer, hardware
    )
    device, _ = limits(hardware)
    where = "GPU" if hardware.device == "cuda" else "rank"
    lines = [
        f"the tables do not fit on {hardware.ranks} ranks ({hardware.hosts} hosts of "
        f"{hardware.ranks_per_host}):",
        f"  rows and optimizer state need {_size(needed)} of {where} memory, the cluster has "
        f"{_size(available)} for them ({_size(device)} per rank, {hardware.reserved:.0%} left free): "
        + (
            f"{_size(needed - available)} short in total"
            if needed > available
            else "enough in total"
        ),
        f"  the worst rank lacks {_size(max(missing, 0))}, ids and vectors of "
        f"{problem.batch:,} samples per rank included"
        if missing > 0
        else "  by size alone every rank could hold its part; the wanted shardings do not",
        "what would make it fit, or how far it gets (by size alone, not searched by the planner):",
    ]
    for words, rest in suggestions(
        problem.tables, problem.placements, problem.optimizer, problem.batch, hardware
    ):
        verdict = "fits" if rest <= 0 else f"the worst rank still lacks {_size(rest)}"
        lines.append(f"  - {words}: {verdict}")
    return "\n".join(lines)


def format_result(problem: Problem, plan: Plan) -> str:
    """Tables, memory per rank, bytes per step and sample: text for a terminal."""
    hardware, memory = problem.hardware, plan.memory
    device, _ = limits(hardware)
    lines = [*_table_lines(plan.tables), ""]
    lines.append(
        f"memory per rank ({_size(device)} usable after {hardware.reserved:.0%} left free)"
    )
    lines += [*_memory_lines(problem, memory), "", *_traffic_lines(problem, plan)]
    if problem.copies > 1:
        lines.append(
            f"  averaging {problem.copies} copies (one per group of {hardware.ranks} ranks): "
            f"{_size(copies_bytes(problem, plan).mean())} per step and rank, between groups"
        )
    lines.append("")
    lines.append(
        f"the library's guess, from constants of other machines, not measured: {plan.guess_ms:.2f} ms "
        "per step in tables"
    )
    lines.append(f"planned in {plan.seconds:.1f} s")
    return "\n".join(lines)


def copies_bytes(problem: Problem, plan: Plan) -> np.ndarray:
    """What averaging the copies sends per step, by rank: an all-reduce of trained rows and state."""
    held = plan.memory.tables + plan.memory.optimizer + plan.memory.host
    return 2 * (problem.copies - 1) / problem.copies * held


def _memory_lines(problem: Problem, memory: Memory) -> list[str]:
    dense = np.array(problem.dense_parameters * DENSE_BYTES)
    parts = {
        name: getattr(memory, name) for name in ("tables", "optimizer", "frozen", "activations")
    }
    parts |= {"dense": dense, "all of it": memory.device + dense}
    parts |= {"host memory": memory.host} if memory.host.max() > 0 else {}
    parts |= {"SSD": memory.ssd} if memory.ssd.max() > 0 else {}
    rows = [[name, _size(sizes.mean()), _size(sizes.max())] for name, sizes in parts.items()]
    return _aligned(rows, ["", "mean", "most"], left=1, indent="  ")


def _aligned(rows: list[list[Any]], head: list[str], left: int, indent: str = "") -> list[str]:
    """Lines of a table whose first `left` columns stand to the left, the others to the right."""
    aligned = ["left"] * left + ["right"] * (len(head) - left)
    table = tabulate(rows, head, tablefmt="plain", disable_numparse=True, colalign=aligned)
    return textwrap.indent(table, indent).splitlines()


def _table_lines(tables: list[TablePlan], most: int = 20) -> list[str]:
    rows = [
        [
            table.table,
            table.sharding,
            table.kernel,
            f"{table.rows:,}",
            table.dim,
            sum(size > 0 for size in table.bytes_per_rank),
            f"{sum(table.bytes_per_rank) / GIB:.2f}",
        ]
        for table in tables[:most]
    ]
    head = ["table", "sharding", "kernel", "rows", "dim", "ranks", "GiB"]
    lines = _aligned(rows, head, left=3)
    if len(tables) > most:
        kinds = Counter(f"{table.sharding} ({table.kernel})" for table in tables)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines.append(f"… {len(tables) - most} more (all are in the JSON); together {counts}")
    return lines


def _traffic_lines(problem: Problem, plan: Plan) -> list[str]:
    names = {
        "input": "ids to rows",
        "output": "vectors back",
        "backward": "gradients of vectors",
        "gradients": "gradients of data-parallel tables",
        "dense": "gradients of the dense part",
    }
    per_rank = {
        names[name]: [sent / ranks for sent in links]
        for name, (links, ranks) in _links(problem, plan).items()
    }
    per_rank["all of it"] = [sum(sent) for sent in zip(*per_rank.values(), strict=True)]
    rows = [
        [
            name,
            f"{inside / problem.batch:,.0f}",
            f"{between / problem.batch:,.0f}",
            _size(inside),
            _size(between),
        ]
        for name, (inside, between) in per_rank.items()
    ]
    links = ("in host", "inter-host")
    head = [
        "",
        *(f"{unit},\n{link}" for unit in ("per sample", "per step and rank") for link in links),
    ]
    title = f"bytes on the wire ({problem.batch:,} samples per rank)"
    return [title, *_aligned(rows, head, left=1, indent="  ")]


def _links(problem: Problem, plan: Plan) -> dict[str, tuple[tuple[float, float], int]]:
    """Stage to ((bytes per step within hosts, between hosts), ranks that send them)."""
    part, whole = problem.hardware, problem.cluster
    links = {
        field.name: (by_link(getattr(plan.traffic, field.name), part.hosts), part.ranks)
        for field in fields(plan.traffic)
    }
    return links | {"dense": (by_link(plan.dense_traffic, whole.hosts), whole.ranks)}


def write_plan(problem: Problem, plan: Plan, out: Path) -> None:
    """Writes all of it: bytes per rank, bytes per step of every stage and link, every piece."""
    stages = {field.name: getattr(plan.traffic, field.name) for field in fields(plan.traffic)}
    stages["dense"] = plan.dense_traffic
    document: dict[str, Any] = {
        "hardware": asdict(problem.hardware),
        "batch_per_rank": problem.batch,
        "optimizer": problem.optimizer,
        "fits": deficit(plan.memory, problem.hardware) <= 0,
        "memory_bytes_per_rank": {
            field.name: getattr(plan.memory, field.name).tolist() for field in fields(plan.memory)
        }
        | {"dense": [problem.dense_parameters * DENSE_BYTES] * problem.hardware.ranks},
        "wire_bytes_per_step": {
            name: {"intra_host": inside, "inter_host": between}
            for name, ((inside, between), _) in _links(problem, plan).items()
        },
        "wire_bytes_sent_per_step_and_rank": {
            name: matrix.sum(1).tolist() for name, matrix in stages.items()
        },
        "copies": problem.copies,
        "copies_bytes_sent_per_step_and_rank": copies_bytes(problem, plan).tolist(),
        "library_guess_ms": plan.guess_ms,
        "planning_seconds": round(plan.seconds, 2),
        "tables": [asdict(table) for table in plan.tables],
    }
    write_json(out, document)


def _size(size: float) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"
