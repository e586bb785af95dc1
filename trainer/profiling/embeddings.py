"""`llm4msr profile embeddings`: sweeps of made-up tables, and the tables of a configured model."""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_knowledge.errors import InputError
from llm_knowledge.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    swept = parser.add_argument_group("sweep", "every combination is measured")
    for name, number, text in (
        ("tables", 8, "number of tables"),
        ("rows", 100_000, "rows of each"),
        ("dim", 64, "width of each, a multiple of 4"),
        ("batch", 1024, "samples per rank"),
        ("pooling", 1, "mean ids per sample and table"),
    ):
        text += f" (default: {number})"
        swept.add_argument(f"--{name}", type=int, nargs="+", default=[number], help=text)
    shardings = "row_wise, table_wise, column_wise, table_row_wise, grid_shard, data_parallel"
    for name, word, text in (
        ("sharding", "row_wise", shardings),
        ("kernel", "fused", "fused; on CUDA also uvm, uvm_caching, key_value"),
        ("collection", "pooled", "pooled, sequence"),
        ("optimizer", "rowwise_adagrad", "sgd, adagrad, rowwise_adagrad"),
    ):
        text += f" (default: {word})"
        swept.add_argument(f"--{name}", nargs="+", default=[word], help=text)
    parser.add_argument(
        "--config", type=Path, help="profile this run's own tables and data instead"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field of --config"
    )
    parser.add_argument("--check", action="store_true", help="compare with unsharded tables first")
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out nn.EmbeddingBag and bare FBGEMM"
    )
    add_measuring_arguments(parser, rounds=20)


def add_measuring_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds what every profiler of a job of ranks takes."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"measurements (default: {rounds})"
    )
    parser.add_argument("--warmup", type=int, default=3, help="rounds not counted (default: 3)")
    parser.add_argument("--out", type=Path, help="directory for report.json")
    parser.add_argument("--plots", action="store_true", help="also write plots (PNG) to --out")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace of rank 0")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--processes", type=int, default=1, help="ranks on this machine (default: 1)"
    )


def check_measuring_arguments(options: argparse.Namespace) -> None:
    """Refuses impossible numbers.

    Raises:
        InputError: If there are any.
    """
    if options.rounds < 2:
        raise InputError(f"--rounds {options.rounds}: at least 2 are needed for a spread")
    if options.warmup < 0:
        raise InputError(f"--warmup {options.warmup}: must not be negative")
    if options.plots and options.out is None:
        raise InputError("--plots needs --out, the directory to write them to")


def main(options: argparse.Namespace) -> int:
    """Profiles on the ranks that there are; rank 0 prints and writes.

    Returns:
        0, or 1 if the check found a difference.

    Raises:
        InputError: If an argument is impossible.
    """
    check_measuring_arguments(options)
    from embeddings.placement import PlanError
    from embeddings.profiling.measure_tables import Options
    from trainer.distributed.process_group import distributed

    how = Options(
        rounds=options.rounds,
        warmup=options.warmup,
        baselines=not options.no_baselines,
        check=options.check,
        trace=options.trace,
    )
    with distributed(timeout_seconds=600) as runtime:
        try:
            report = (
                profile_configured(options.config, options.set, how, runtime)
                if options.config
                else profile_sweep(options, how, runtime)
            )
        except PlanError as error:
            raise InputError(f"profile embeddings: {error}", shared=True) from error
        if runtime.is_main:
            from embeddings.profiling.report import text_of, write_plots

            publish(options, report, text_of, write_plots)
    return int(any(cell.get("wrong") for cell in report["cells"]))


def publish(options: argparse.Namespace, report: dict[str, Any], text_of: Any, plots: Any) -> None:
    """Prints a report and writes its files."""
    print(json.dumps(report, indent=1) if options.json else text_of(report))
    if options.out:
        write_json(options.out / "report.json", report)
        files = [
            options.out / "report.json",
            *(plots(report, options.out) if options.plots else []),
        ]
        print(f"written: {', '.join(map(str, files))}", file=sys.stderr)


def profile_sweep(options: argparse.Namespace, how: Any, runtime: Any) -> dict[str, Any]:
    """Measures made-up tables."""
    from embeddings.profiling.measure_tables import profile_cells, sweep
    from trainer.config.tables import HardwareConfig
    from trainer.run.hardware import this_cluster

    axes = (
        "tables",
        "rows",
        "dim",
        "batch",
        "pooling",
        "sharding",
        "kernel",
        "collection",
        "optimizer",
    )
    try:
        cells = sweep(**{axis: getattr(options, axis) for axis in axes})
    except ValueError as error:
        raise InputError(f"profile embeddings: {error}", shared=True) from error
    return profile_cells(cells, this_cluster(HardwareConfig(), runtime), runtime.device, how)


def profile_configured(path: Path, changes: list[str], how: Any, runtime: Any) -> dict[str, Any]:
    """Measures the collections of a configured model on its own data; nothing of a run is touched."""
    from embeddings.profiling.measure_tables import heading, measure
    from trainer.config.run import load_config

    with scratch_run(load_config(path, changes), runtime) as run:
        device = run.runtime.device
        report = heading(device, how)
        report["config"] = str(path)
        report["cells"] = [
            measure(
                subject, device, how, report["copy_bandwidth"], how.trace if number == 0 else None
            )
            for number, subject in enumerate(configured_subjects(run))
        ]
        return report


@contextmanager
def scratch_run(config: Any, runtime: Any) -> Iterator[Any]:
    """Builds a run in a directory that is removed afterwards."""
    import torch.distributed as dist

    from trainer.distributed.process_group import on_all_ranks
    from trainer.run.build import build
    from trainer.run.inputs import open_inputs

    inputs = on_all_ranks(lambda: open_inputs(config, runtime))
    places = [tempfile.TemporaryDirectory() if runtime.is_main else None]
    names = [places[0].name if places[0] else None]
    dist.broadcast_object_list(names)
    try:
        yield build(config, runtime, Path(str(names[0])), inputs)
    finally:
        if places[0]:
            places[0].cleanup()


def configured_subjects(run: Any) -> list[Any]:
    """What each sharded collection of a model is fed, caught on the way of real batches."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torchrec.distributed.embedding import ShardedEmbeddingCollection
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

    from embeddings.profiling.measure_tables import BATCHES
    from embeddings.profiling.phases import Subject

    kinds = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
    modules = {n: m for n, m in run.model.module.named_modules() if isinstance(m, kinds)}
    caught: dict[str, list[Any]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: caught[name].append(args[0]))
        for name, module in modules.items()
    ]
    events = run.stream(list(run.config.data.train_splits), shuffle=True)
    batches = run.remap_ids(events.batches(), assign=True)
    run.model.eval()
    with torch.no_grad():
        for batch in itertools.islice(batches, BATCHES):
            run.model(batch.to(run.runtime.device))
    for hook in hooks:
        hook.remove()
    run.model.train()
    subjects = []
    for name, module in modules.items():
        tables = [t for t in run.model.module.tables if t.name in module._table_names]
        replicated = any(isinstance(lookup, DistributedDataParallel) for lookup in module._lookups)
        subjects.append(
            Subject(
                f"{name}: tables {', '.join(table.name for table in tables)}",
                tables,
                module,
                caught[name],
                None if tables[0].frozen else run.config.tables.optimizer,
                run.config.tables.learning_rate,
                **({"update": run.optimizer.step} if replicated else {}),
            )
        )
    return subjects
