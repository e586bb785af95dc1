"""Where each microsecond and byte of the embedding path goes, with baselines measured beside it."""

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.optimizer import TableOptimizer, fuse_optimizer
from embeddings.placement import KERNELS, Placement, PlanError, check_placement
from embeddings.profiling.baselines import RULES, BareKernel, PlainTables, Reference, check
from embeddings.profiling.measure import (
    Clock,
    copy_bandwidth,
    data_sheet_bandwidth,
    gather_bandwidth,
    link_bandwidth,
    machine,
    summary,
)
from embeddings.profiling.phases import (
    PHASES,
    Subject,
    Timing,
    count_link_bytes,
    count_memory_bytes,
    run_phases,
    run_step,
)
from embeddings.replicated import train_replicated_tables
from embeddings.sharding import Hardware, plan_sharding, shard
from embeddings.tables import Table, pooled_collection, sequence_collection
from embeddings.versions import versions

SHARDINGS = (
    "row_wise",
    "table_wise",
    "column_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
)
COLLECTIONS = ("pooled", "sequence")
BATCHES = 8  # distinct batches, so that a batch's rows have left the cache when it comes again


@dataclass(frozen=True)
class Cell:
    """One point of a sweep; sizes are per table, `batch` is per rank.

    Attributes:
        tables: Number of tables, each read by one feature.
        rows: Rows of each.
        dim: Width of each.
        batch: Samples per rank.
        pooling: Mean ids per sample and feature; the numbers vary from 0 to twice that, but 1 is 1.
        sharding: One of `SHARDINGS`.
        kernel: Key of `embeddings.placement.KERNELS`.
        collection: "pooled" (the sum over a sample's ids) or "sequence" (a vector per id).
        optimizer: "sgd", "adagrad" or "rowwise_adagrad".
    """

    tables: int
    rows: int
    dim: int
    batch: int
    pooling: int
    sharding: str = "row_wise"
    kernel: str = "fused"
    collection: str = "pooled"
    optimizer: str = "rowwise_adagrad"

    @property
    def name(self) -> str:
        """What the cell is called in tables and plots."""
        return (
            f"{self.tables} x [{self.rows:,} x {self.dim}] {self.collection}, batch {self.batch:,}, "
            f"pooling {self.pooling}, {self.sharding}, {self.kernel}, {self.optimizer}"
        )


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: Measurements of everything, in turn.
        warmup: Rounds before them that are not counted.
        baselines: Whether to measure plain torch and the bare kernel beside the sharded tables.
        check: Whether to compare outputs and updated rows with unsharded tables first.
        trace: Rank 0 writes a Chrome trace of the last two rounds here.
        reference: Makes the tables to compare with.
    """

    rounds: int = 20
    warmup: int = 3
    baselines: bool = True
    check: bool = False
    trace: Path | None = None
    reference: Callable[[Subject], Reference] = Reference


def sweep(**axes: Iterable[Any]) -> list[Cell]:
    """Every combination of the given values of `Cell`'s fields.

    Raises:
        ValueError: If a value is impossible.
    """
    cells = [
        Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]
    allowed = {
        "sharding": SHARDINGS,
        "kernel": KERNELS,
        "collection": COLLECTIONS,
        "optimizer": RULES,
    }
    for cell in cells:
        for name, value in asdict(cell).items():
            if name in allowed and value not in allowed[name]:
                raise ValueError(f"{name} {value!r}: use one of {', '.join(allowed[name])}")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} {value}: at least 1 is needed")
        if cell.dim % 4:
            raise ValueError(f"dim {cell.dim}: the kernels need a multiple of 4")
    return cells


def random_ids(cell: Cell, device: torch.device) -> list[KeyedJaggedTensor]:
    """Uniformly random ids of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    features = [f"feature_{number}" for number in range(cell.tables)]
    batches = []
    for _ in range(BATCHES):
        lengths = torch.ones(cell.tables * cell.batch, dtype=torch.int64)
        if cell.pooling > 1:
            lengths = torch.randint(0, 2 * cell.pooling + 1, lengths.shape, generator=generator)
        values = torch.randint(cell.rows, (int(lengths.sum()),), generator=generator)
        batches.append(KeyedJaggedTensor(features, values.to(device), lengths=lengths.to(device)))
    return batches


def build(cell: Cell, hardware: Hardware, device: torch.device) -> Subject:
    """Makes and shards a cell's tables.

    Raises:
        PlanError: If they cannot be sharded so.
    """
    sequence = cell.collection == "sequence"
    tables = [
        Table(
            f"table_{number}",
            cell.rows,
            cell.dim,
            (f"feature_{number}",),
            sequence=sequence,
            ids_per_sample=(float(cell.pooling),),
        )
        for number in range(cell.tables)
    ]
    placement = Placement(cell.sharding, cell.kernel)
    check_placement(tables[0].name, sequence, placement, device.type)
    model = nn.Module()
    model.collection = (sequence_collection if sequence else pooled_collection)(tables, 0.1)
    rate = 0.01
    rule = TableOptimizer(cell.optimizer, rate)
    fuse_optimizer(model.parameters(), rule)
    plan = plan_sharding(model, tables, {t.name: placement for t in tables}, cell.batch, hardware)
    sharded = shard(model, plan, device)
    # A step of it steps the data-parallel tables, if there are any.
    ticker = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    train_replicated_tables(sharded, plan, rule, ticker, frozen="-")
    return Subject(
        cell.name,
        tables,
        sharded.module.collection,
        random_ids(cell, device),
        cell.optimizer,
        rate,
        update=ticker.step,
    )


def profile_cells(
    cells: list[Cell], hardware: Hardware, device: torch.device, options: Options
) -> dict[str, Any]:
    """Measures cells one after the other, on all ranks together.

    Returns:
        On every rank, the report: "machine", "versions", "ranks", "copy_bandwidth", "cells". A cell
        that cannot be has "impossible" with the reason, instead of measurements.

    Raises:
        PlanError: If no cell is possible.
    """
    results: list[dict[str, Any]] = []
    top = heading(device, options)
    for number, cell in enumerate(cells):
        try:
            subject = build(cell, hardware, device)
        except PlanError as error:
            results.append({"name": cell.name, "cell": asdict(cell), "impossible": str(error)})
            continue
        trace = options.trace if number == 0 else None
        results.append(
            measure(subject, device, options, top["copy_bandwidth"], trace) | {"cell": asdict(cell)}
        )
    if all("impossible" in result for result in results):
        raise PlanError(results[0]["impossible"])
    return top | {"cells": results}


def heading(device: torch.device, options: Options) -> dict[str, Any]:
    """What all measurements of a report share."""
    return {
        "machine": machine(),
        "versions": versions(),
        "device": device.type,
        "ranks": dist.get_world_size(),
        "rounds": options.rounds,
        "warmup": options.warmup,
        "copy_bandwidth": copy_bandwidth(device),
    }


def measure(
    subject: Subject,
    device: torch.device,
    options: Options,
    copy: float,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measures one collection: phases, whole steps, and baselines, in turn within every round.

    A time is that of the slowest rank; bytes are those of the rank that has most.

    Args:
        subject: The collection; it is trained.
        device: Where it lies.
        options: How to measure.
        copy: The memory's bytes per second, of `heading`.
        trace: Where rank 0 writes a Chrome trace.

    Returns:
        On every rank: "phases", "sum_of_phases", "forward", "step", "baselines", "wrong" and more.
    """
    clock = Clock(device)
    report: dict[str, Any] = {"name": subject.name, "rule": subject.rule}
    if options.check:
        wrong = check(subject, options.reference(subject))
        report["wrong"] = [line for lines in gather(wrong) for line in lines]
    arms: dict[str, Callable[[int], dict[str, Timing]]] = {
        "phases": lambda step: run_phases(subject, step, clock),
        "sharded": lambda step: run_step(subject, step, clock),
    }
    rules: dict[str, str | None] = {}
    if options.baselines and (subject.rule is None or subject.rule in RULES):
        for name, kind in (("embedding_bag", PlainTables), ("fbgemm", BareKernel)):
            baseline = kind(subject, device)
            rules[name] = baseline.rule
            arms[name] = lambda step, b=baseline: b.step(
                subject.fresh(step), subject.gradient(step), clock
            )  # type: ignore[misc]
    seconds = _rounds(arms, options)
    memory = _largest(count_memory_bytes(subject, 0))
    link = _largest(count_link_bytes(subject, 0, clock))
    if trace is not None:
        _write_trace(subject, clock, trace)
    return report | _report(subject, device, seconds, memory, link, rules, copy)


Rounds = dict[str, list[Timing]]  # "arm part" to one timing per round


def _rounds(arms: dict[str, Callable[[int], dict[str, Timing]]], options: Options) -> Rounds:
    """Runs every arm once per round, in an order drawn anew; the slowest rank counts.

    An arm gains from running after itself. With the orders drawn, all do so equally often.
    """
    order, names = random.Random(0), list(arms)  # the same on all ranks
    timings_here: dict[str, list[Timing]] = {}
    for step in range(options.warmup + options.rounds):
        order.shuffle(names)
        for name in names:
            dist.barrier()
            timings = arms[name](step)
            if step >= options.warmup:
                for part, timing in timings.items():
                    timings_here.setdefault(f"{name} {part}", []).append(timing)
    everywhere = gather(timings_here)
    return {
        key: [
            (max(pair[0] for pair in of_ranks), max(pair[1] for pair in of_ranks))
            for of_ranks in zip(*(rank[key] for rank in everywhere), strict=True)
        ]
        for key in timings_here
    }


def gather(value: Any) -> list[Any]:
    """Everybody's value, by rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def _largest(sizes: dict[str, int]) -> dict[str, int]:
    everywhere = gather(sizes)
    return {key: max(rank[key] for rank in everywhere) for key in sizes}


def _milliseconds(timings: list[Timing]) -> dict[str, Any]:
    wall, processor = (
        [1e3 * seconds for seconds in values] for values in zip(*timings, strict=True)
    )
    return {"ms": summary(wall), "processor_ms": summary(processor), "each_ms": wall}


def _ratios(numerator: list[Timing], denominator: list[Timing]) -> dict[str, Any]:
    """Of time passed and of processor time, round by round."""
    pairs = list(zip(numerator, denominator, strict=True))
    return {
        "time": summary([a[0] / b[0] for a, b in pairs]),
        "processor_time": summary([a[1] / max(b[1], 1e-9) for a, b in pairs]),
    }


def _report(
    subject: Subject,
    device: torch.device,
    seconds: Rounds,
    memory: dict[str, int],
    link: dict[str, int],
    rules: dict[str, str | None],
    copy: float,
) -> dict[str, Any]:
    table = max(subject.tables, key=lambda table: table.rows)
    ids = max(subject.batches[0].values().numel(), 1)
    dtype = torch.float16 if table.bytes_per_value == 2 else torch.float32
    random_rows = gather_bandwidth(table.rows, table.dim, ids, dtype, device)
    promised = data_sheet_bandwidth(machine()["gpu"] if device.type == "cuda" else None)
    phases: dict[str, Any] = {}
    for name in PHASES:
        if f"phases {name}" not in seconds:
            continue
        timings = seconds[f"phases {name}"]
        milliseconds = _milliseconds(timings)
        spent = milliseconds["ms"]["median"] / 1e3
        wire = link_bandwidth(link[name], device)
        phases[name] = milliseconds | {
            "memory_bytes": memory[name],
            "data_sheet_ms": None if promised is None else 1e3 * memory[name] / promised,
            "link_bytes": link[name],
            "share_of_copy_bandwidth": memory[name] / spent / copy,
            "share_of_gather_bandwidth": memory[name] / spent / random_rows,
            "share_of_link_bandwidth": None if wire is None else link[name] / spent / wire,
        }
    sums = [
        (sum(part[0] for part in parts), sum(part[1] for part in parts))
        for parts in zip(*(seconds[f"phases {name}"] for name in phases), strict=True)
    ]
    sharded = seconds["sharded step"]
    samples = subject.batches[0].stride() * dist.get_world_size()
    return {
        "gather_bandwidth": random_rows,
        "phases": phases,
        "sum_of_phases": _milliseconds(sums),
        "sum_of_phases_over_step": _ratios(sums, sharded),
        "forward": _milliseconds(seconds["sharded forward"]),
        "step": _milliseconds(sharded),
        "samples_per_second": samples / (summary([wall for wall, _ in sharded])["median"]),
        "baselines": {
            name: {
                "rule": rule,
                "forward": _milliseconds(seconds[f"{name} forward"]),
                "step": _milliseconds(seconds[f"{name} step"]),
                "step_over_sharded": _ratios(seconds[f"{name} step"], sharded),
                "sharded_over_step": _ratios(sharded, seconds[f"{name} step"]),
            }
            for name, rule in rules.items()
        },
    }


def _write_trace(subject: Subject, clock: Clock, path: Path) -> None:
    from torch.profiler import profile, record_function

    with profile() as profiler:
        for step in range(2):
            run_phases(subject, step, clock, record_function)
            with record_function("whole step"):
                run_step(subject, step, clock)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
