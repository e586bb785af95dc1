"""The commands and their options."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import launch.commands as run
from launch.arguments import CommandParser
from launch.logs import LEVELS as LOG_LEVELS
from trainer.evaluation.metrics import SEGMENTS

Commands = argparse._SubParsersAction
CONTINUES = "the same command goes on where it stopped"


def _add_overrides(
    parser: argparse.ArgumentParser, text: str = "override a field; repeatable"
) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help=text)


def _add_processes(
    parser: argparse.ArgumentParser, text: str = "processes on this machine", default: int = 1
) -> None:
    parser.add_argument(
        "--processes", type=int, default=default, help=f"{text} (default: {default})"
    )


def build_parser() -> CommandParser:
    """Builds the parser of `llm4msr`; `options.run(options, words)` runs what was asked for."""
    root = CommandParser(
        prog="llm4msr",
        description="Multi-scenario recommendation lifted by a frozen language model, from log to report.",
        epilog="example: llm4msr quickstart --out quickstart",
    )
    root.set_defaults(parser=root)
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_schema,
        _add_prepare,
        _add_simulate,
        _add_knowledge,
        _add_train,
        _add_plan,
        _add_evaluate,
        _add_compare,
        _add_report,
        _add_profile,
        _add_pipeline,
        _add_launch,
    ):
        add(commands)
    return root


def command(
    parent: Commands,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], int | None],
    text: str,
    example: str,
    when_interrupted: str = "",
) -> argparse.ArgumentParser:
    """Adds a command with its example, and with the options that every command has.

    Args:
        parent: Where it is added.
        name: What is typed.
        run: What it runs, see `launch.commands`.
        text: What it does.
        example: A whole command line, without the program.
        when_interrupted: How to go on after Ctrl-C.
    """
    parser = parent.add_parser(
        name, help=text, description=text, epilog=f"example: llm4msr {example}"
    )
    parser.set_defaults(run=run, when_interrupted=when_interrupted)
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="least severe messages that are shown (default: info)",
    )
    return parser


def _add_quickstart(commands: Commands) -> None:
    p = command(
        commands,
        "quickstart",
        run.run_quickstart,
        "Takes real data (MovieLens) through the whole system and compares every arm.",
        "quickstart --out quickstart",
        CONTINUES,
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        help="directory for everything (default: quickstart)",
    )
    p.add_argument(
        "--raw",
        type=Path,
        help="folder with ratings.csv and movies.csv (default: found or downloaded)",
    )
    p.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    _add_processes(p, "training processes", default=2)


def _add_schema(commands: Commands) -> None:
    p = command(
        commands,
        "schema",
        run.draft_schema,
        "Drafts the schema of a log from its files: guesses with their reasons, and warnings.",
        "schema --raw log --catalogue items.parquet --out schema.yaml",
    )
    p.add_argument("--raw", type=Path, required=True, help="the log: a Parquet file or a folder")
    p.add_argument("--users", type=Path, help="the users' table, if there is one")
    p.add_argument("--catalogue", type=Path, help="the table of items, if there is one")
    p.add_argument("--out", type=Path, help="file to write (default: it is printed)")


def _add_prepare(commands: Commands) -> None:
    p = command(
        commands,
        "prepare",
        run.prepare,
        "Turns a source into the project's interaction Parquet, split by time.",
        "prepare movielens --out data/movielens",
    )
    p.add_argument(
        "source", choices=["movielens", "food-kitchen", "parquet"], help="what --raw holds"
    )
    p.add_argument(
        "--raw", type=Path, help="the source's files; may be left out where they can be found"
    )
    p.add_argument("--out", type=Path, required=True, help="directory to create")
    p.add_argument(
        "--schema", type=Path, help="parquet: YAML that names columns, scenarios and split"
    )
    p.add_argument(
        "--append-to",
        type=Path,
        metavar="DATA",
        help="parquet: later events of the log behind this dataset; --out becomes its successor",
    )
    p.add_argument(
        "--negatives",
        type=int,
        help="sampled per positive: food-kitchen (default: 4), or parquet, for a log of positives alone "
        "(default: what the schema says)",
    )
    p.add_argument("--seed", type=int, default=0, help="food-kitchen: of the sampling (default: 0)")
    p.add_argument(
        "--held-out-users",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="movielens, food-kitchen: train nothing of this share of the users; prompts read their first "
        "events, all later ones are test (default: 0)",
    )
    p.add_argument(
        "--held-out-valid-users",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="movielens, food-kitchen: the same of a further share, whose later events are valid, so that "
        "what is chosen there is chosen for new users too (default: 0)",
    )


def _add_simulate(commands: Commands) -> None:
    p = command(
        commands,
        "simulate",
        run.simulate_log,
        "Writes a multi-scenario log with planted truth and readable text, in constant memory.",
        "simulate --out data/simulated --users 2000 --items 1000 --scenarios 3 --events 100000 --seed 0",
    )
    p.add_argument("--out", type=Path, required=True, help="directory to create")
    sizes = {"users": 2000, "items": 1000, "scenarios": 3, "events": 100_000, "seed": 0}
    for name, default in sizes.items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")


def _add_knowledge(commands: Commands) -> None:
    if importlib.util.find_spec("pydantic") is None:
        return  # a machine with torch and triton alone times the op; it extracts nothing
    from llm_knowledge.extraction.config import add_arguments, add_refresh_arguments
    from llm_knowledge.options import add_options
    from llm_knowledge.store.options import CompressOptions, InspectOptions, ShuffleOptions

    knowledge = commands.add_parser(
        "knowledge", help="Prompts, frozen language model, knowledge stores."
    )
    stages = knowledge.add_subparsers(title="commands", required=True, metavar="COMMAND")
    p = command(
        stages,
        "extract",
        run.extract,
        "Writes prompts, reads them with a frozen language model, keeps the hidden states as a store.",
        "knowledge extract --data data/movielens --level all --out knowledge/movielens --processes 2",
        CONTINUES,
    )
    _add_processes(p, "workers on this machine")
    add_arguments(p)
    p = command(
        stages,
        "inspect",
        run.inspect,
        "Shows a store to a human: prompt, neighbours, facts.",
        "knowledge inspect knowledge/movielens/item --key 1",
    )
    add_options(p, InspectOptions)
    p = command(
        stages,
        "verify",
        run.verify_stores,
        "Runs every check on stores: keys, dimensions, values, checksums.",
        "knowledge verify knowledge/movielens/user knowledge/movielens/item",
    )
    p.add_argument("stores", type=Path, nargs="+", help="store directories")
    p = command(
        stages,
        "shuffle",
        run.shuffle_store,
        "Writes the control of every claim: a store whose vectors know nothing of their keys.",
        "knowledge shuffle knowledge/movielens/user --out knowledge/movielens/user-shuffled",
    )
    add_options(p, ShuffleOptions)
    p = command(
        stages,
        "compress",
        run.compress_store,
        "Writes a smaller store: fewer dimensions, fewer bits; says what was lost.",
        "knowledge compress knowledge/movielens/user --out knowledge/movielens/user-64 --dim 64 "
        "--dtype int8",
    )
    add_options(p, CompressOptions)
    p = command(
        stages,
        "refresh",
        run.refresh_store,
        "Writes the store's successor: only changed prompts are read again; forgets on request.",
        "knowledge refresh knowledge/movielens/item --data data/movielens "
        "--out knowledge/movielens/item-today --remove 1",
    )
    add_refresh_arguments(p)


def _add_train(commands: Commands) -> None:
    p = command(
        commands,
        "train",
        run.train_runs,
        "Trains one run; several configurations run one after the other.",
        "train --config launch/configs/movielens.yaml --set train.seed=1 --set output=runs/seed-1 "
        "--processes 2",
        "the same command with --resume goes on from the newest checkpoint",
    )
    p.add_argument("--config", type=Path, nargs="+", required=True, help="YAML files, one per run")
    _add_overrides(p)
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    _add_processes(p)


def _add_plan(commands: Commands) -> None:
    p = command(
        commands,
        "plan",
        run.plan_tables,
        "Plans tables on a cluster that is not there: memory, bytes on the wire, what does not fit.",
        "plan --tables launch/configs/hundred_tables.yaml --nodes 8 --gpus-per-node 8",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="a run's configuration: YAML")
    source.add_argument(
        "--tables", type=Path, help="tables alone: YAML, see docs/reference/planning.md"
    )
    p.add_argument("--nodes", "--hosts", type=int, required=True, help="hosts of the cluster")
    p.add_argument(
        "--gpus-per-node", "--gpus-per-host", type=int, required=True, help="ranks on each"
    )
    p.add_argument("--hbm-gib", type=float, help="memory of a GPU (default: configured, or 80)")
    p.add_argument("--batch-per-rank", type=int, help="samples (default: as configured)")
    p.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="of the ranks (default: cuda)"
    )
    _add_overrides(p, "override a field, e.g. hardware.inter_host_gbs=25; repeatable")
    p.add_argument("--out", type=Path, help="JSON file to write: bytes per rank, every piece")


def _add_evaluate(commands: Commands) -> None:
    p = command(
        commands,
        "evaluate",
        run.evaluate_run,
        "Scores a split with a run's best checkpoint; exact metrics overall and per scenario.",
        "evaluate runs/seed-1",
    )
    p.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    p.add_argument("--split", choices=["valid", "test"], default="test", help="(default: test)")
    p.add_argument("--reuse-predictions", action="store_true", help="do not score again")
    _add_overrides(p, "override a field, e.g. data.path=PLACE of the moved data")


def _add_compare(commands: Commands) -> None:
    p = command(
        commands,
        "compare",
        run.compare_runs,
        "Differences to the first run with paired bootstrap intervals over users and seeds.",
        "compare quickstart/runs/star quickstart/runs/star+llm4msr",
    )
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory, or folder of runs by seed"
    )
    p.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default: 1000)")
    p.add_argument("--segment", choices=SEGMENTS, help="only these impressions")
    p.add_argument("--out", type=Path, help="JSON file to write")


def _add_report(commands: Commands) -> None:
    p = command(
        commands,
        "report",
        run.report_on_runs,
        "Writes one self-contained HTML page about runs.",
        "report quickstart/runs/star quickstart/runs/star+llm4msr --out report.html",
    )
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory, or folder of runs by seed"
    )
    p.add_argument("--out", type=Path, default=Path("report.html"), help="(default: report.html)")


def _add_profile(commands: Commands) -> None:
    from trainer.profiling.meta_layer import add_arguments as add_meta_layer_arguments

    profile = commands.add_parser("profile", help="Where the time goes.")
    parts = profile.add_subparsers(title="commands", required=True, metavar="COMMAND")
    p = command(
        parts,
        "meta-layer",
        run.profile_meta_layer,
        "Times the meta-layer op for your shapes: strategy, time, share of the machine's peak.",
        "profile meta-layer --batch 4096 --rank 32 --in-features 128 --out-features 128",
    )
    add_meta_layer_arguments(p)

    from trainer.profiling.embeddings import add_arguments as add_embeddings_arguments

    p = command(
        parts,
        "embeddings",
        run.profile_embeddings,
        "Times each phase of embedding lookups, counts its bytes, compares with plain torch and FBGEMM.",
        "profile embeddings --tables 8 --dim 16 64 --sharding row_wise table_wise --check --processes 2",
    )
    add_embeddings_arguments(p)

    from trainer.profiling.train import add_arguments as add_profile_train_arguments

    p = command(
        parts,
        "train",
        run.profile_train,
        "Times each phase of a configured model's step, and samples/s with the loader in and out.",
        "profile train --config launch/configs/movielens.yaml --processes 2",
    )
    add_profile_train_arguments(p)


def _add_pipeline(commands: Commands) -> None:
    p = command(
        commands,
        "pipeline",
        run.run_pipeline,
        "Extracts what a run joins, trains it, evaluates, reports; complete stages are skipped.",
        "pipeline --config launch/configs/movielens.yaml --processes 2",
        CONTINUES,
    )
    p.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    _add_overrides(p)
    p.add_argument(
        "--extract", default="", metavar="ARGUMENTS", help="of `knowledge extract`, as one word"
    )
    _add_processes(p)


def _add_launch(commands: Commands) -> None:
    p = command(
        commands,
        "launch",
        run.launch_stage,
        "Runs a stage through a torchx scheduler; its own arguments follow --.",
        "launch train --scheduler local_cwd -j 2x2 -- --config launch/configs/movielens.yaml",
    )
    p.add_argument(
        "stage", choices=["extract", "train", "evaluate", "profile", "pipeline"], help="what to run"
    )
    p.add_argument("--job", type=Path, help="job file: where and how; the flags override it")
    p.add_argument("--scheduler", help="torchx scheduler, or jobset (default: local_cwd)")
    p.add_argument("-j", metavar="NxM", help="hosts x processes per host (default: 1x2)")
    p.add_argument("--resource", help="named resource of a host, e.g. h100x8 (default: cpu)")
    p.add_argument("--image", help="container image, where the scheduler starts containers")
    p.add_argument(
        "--cfg", action="append", default=[], metavar="K=V", help="option of the scheduler"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="A=B", help="override a field of the job"
    )
    p.add_argument("--dryrun", action="store_true", help="show what would be submitted")
