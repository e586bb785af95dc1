"""`llm4msr profile train`: where a configured model's step goes, samples/s with the loader in and out."""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from tabulate import tabulate

from trainer.profiling.embeddings import (
    add_measuring_arguments,
    check_measuring_arguments,
    publish,
    scratch_run,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field; repeatable"
    )
    add_measuring_arguments(parser, rounds=20)


def main(options: argparse.Namespace) -> None:
    """Profiles on the ranks that there are; rank 0 prints and writes.

    Raises:
        InputError: If an argument or the configuration is impossible.
    """
    check_measuring_arguments(options)
    from trainer.config.run import load_config
    from trainer.distributed.process_group import distributed
    from trainer.profiling.train_phases import profile_train

    config = load_config(options.config, options.set)
    with distributed(config.train.timeout_seconds) as runtime:
        with scratch_run(config, runtime) as run:
            report = profile_train(run, options.rounds, options.warmup, options.trace)
        report["config"] = str(options.config)
        if runtime.is_main:
            publish(options, report, text_of, write_plots)


def text_of(report: dict[str, Any]) -> str:
    """The report as text."""
    machine, phases = report["machine"], report["phases"]
    samples = f"{report['global_batch_size']:,} samples per step"
    lines = [
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, {report['ranks']} ranks, "
        f"torch {machine['torch']}, load {machine['load']:.1f}, {samples}",
    ]
    rows = [
        [name, _spread(phases[name]), f"{phases[name]['median'] / report['serial_step']:.0%}"]
        for name in report["order"]
    ]
    rows += [[f"of which {name}", _spread(phases[name]), ""] for name in report["meta"]]
    table = tabulate(
        rows,
        ["phase, one after the other", "ms", "of the serial step"],
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )
    lines += textwrap.indent(table, "  ").splitlines()
    rates = report["samples_per_second"]
    lines += [
        f"  serial step                 {report['serial_step']:.2f} ms: computing {report['compute']:.2f}, "
        f"communicating {report['communication']:.2f}",
        f"  pipelined step, loader out  {_spread(report['step'])} ms; exposed communication and overhead "
        f"{report['exposed_communication']:.2f} ms",
        f"  samples/s                   loader in {rates['loader in']['median']:,.0f}, "
        f"loader out {rates['loader out']['median']:,.0f}, in / out {_spread(report['loader_in_over_out'])}",
    ]
    if machine["load"] > machine["threads"] * report["ranks"] + 0.5:
        lines.append("  the machine is busy with something else: repeat when it is idle")
    return "\n".join(lines)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes train.png: the phases of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [*report["order"], *report["meta"]]
    values = [report["phases"][name] for name in names]
    medians = [spread["median"] for spread in values]
    below = [spread["median"] - spread["low"] for spread in values]
    above = [spread["high"] - spread["median"] for spread in values]
    axes.barh(names, medians, xerr=[below, above])
    axes.invert_yaxis()
    axes.set_xlabel("ms (median, quartiles), one phase after the other")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "train.png", dpi=120)
    return [folder / "train.png"]
