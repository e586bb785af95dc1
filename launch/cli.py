"""The command line. Nothing heavy is imported until a command needs it, so that help is instant."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llm_knowledge.errors import InputError

DONE, FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done and complete; 2 the input was wrong (one message, no traceback); 1 a fault of ours.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        # What follows -- belongs to the stage that `launch` submits.
        at = words.index("--") if "--" in words else len(words)
        options = _parser().parse_args(words[:at])
        options.arguments = words[at + 1 :]
        if getattr(options, "processes", 1) < 1:
            raise InputError(f"--processes {options.processes}: at least 1 is needed")
        return options.run(options, words) or DONE
    except InputError as error:
        # Ranks agree on bad input before they raise it: one of them speaks for all.
        if os.environ.get("RANK", "0") == "0" or not error.shared:
            print(f"llm4msr: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = error.filename or "a file of this command"
        print(
            f"llm4msr: error: {where}: {error.strerror}; make room or choose another place",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print("llm4msr: interrupted; the same command continues where it can", file=sys.stderr)
        return INTERRUPTED


def _quickstart(options: argparse.Namespace, words: list[str]) -> int | None:
    from launch.quickstart import quickstart

    quickstart(options.out, raw=options.raw, seeds=options.seeds, processes=options.processes)
    return None


def _prepare(options: argparse.Namespace, words: list[str]) -> int | None:
    if options.source == "movielens":
        from trainer.data.movielens import prepare_movielens

        info = prepare_movielens(options.raw, options.out)
    elif options.source == "food-kitchen":
        from trainer.data.food_kitchen import prepare_food_kitchen

        info = prepare_food_kitchen(
            options.raw, options.out, negatives=options.negatives, seed=options.seed
        )
    else:
        from trainer.data.prepare import prepare_parquet

        if options.raw is None or options.schema is None:
            raise InputError(
                "prepare parquet needs --raw (a file or folder) and --schema (a YAML file)"
            )
        info = prepare_parquet(options.raw, options.out, options.schema)
    print(f"{options.out}: {info.users:,} users, {info.items:,} items, rows {info.rows}")
    return None


def _simulate(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.data.simulate import simulate

    info = simulate(
        options.out,
        options.users,
        options.items,
        options.scenarios,
        options.events,
        seed=options.seed,
    )
    truth = info.truth.bayes_auc if info.truth else {}
    print(f"{options.out}: rows {info.rows}, Bayes-optimal AUC {truth}")
    return None


def _extract(options: argparse.Namespace, words: list[str]) -> int | None:
    if options.processes > 1 and "RANK" not in os.environ:
        from launch.workers import run_workers

        return run_workers("launch", words, options.processes)
    from llm_knowledge.extract import main as extract_main

    extract_main(options)
    return None


def _inspect(options: argparse.Namespace, words: list[str]) -> int | None:
    from llm_knowledge.inspect import inspect_store

    inspect_store(options.store, key=options.key)
    return None


def _verify(options: argparse.Namespace, words: list[str]) -> int | None:
    from llm_knowledge.store import verify

    for store in options.stores:
        verify(store)
        print(f"{store}: every check passed")
    return None


def _shuffle(options: argparse.Namespace, words: list[str]) -> int | None:
    from llm_knowledge.writer import shuffled_store

    shuffled_store(options.store, options.out, options.seed)
    print(f"{options.out}: the vectors of {options.store}, each given to another key")
    return None


def _compress(options: argparse.Namespace, words: list[str]) -> int | None:
    from llm_knowledge.compress import main as compress_main

    return compress_main(options)


def _refresh(options: argparse.Namespace, words: list[str]) -> int | None:
    from llm_knowledge.refresh import main as refresh_main

    return refresh_main(options)


def _train(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.config import load_config

    configs = [load_config(path, options.set) for path in options.config]
    if options.processes > 1 and "RANK" not in os.environ:
        from launch.workers import run_workers

        return run_workers("launch", words, options.processes)
    from trainer.distributed import distributed
    from trainer.train import train

    # One process group for all runs: a second one would find the first one's keys in the store.
    with distributed(configs[0].train.timeout_seconds) as runtime:
        for config in configs:
            folder = train(config, resume=options.resume)
            if runtime.is_main:
                found = json.loads((folder / "summary.json").read_text())
                print(f"{folder}: {found}", file=sys.stderr)
    return None


def _evaluate(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.metrics import write_evaluation

    if not options.reuse_predictions:
        from trainer.scoring import predict

        predict(options.run_dir, options.split, options.set)
    print(json.dumps(write_evaluation(options.run_dir, options.split), indent=1))
    return None


def _compare(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.compare import compare, format_table, write_comparison
    from trainer.predictions import group_runs

    result = compare(group_runs(options.runs), samples=options.samples, segment=options.segment)
    print(format_table(result))
    if options.out:
        write_comparison(result, options.out)
    return None


def _report(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.compare import compare
    from trainer.predictions import group_runs, resolve_runs
    from trainer.report import write_report

    groups = group_runs(options.runs)
    comparison = compare(groups) if len(groups) > 1 else None
    runs = [run for path in options.runs for run in resolve_runs(path)]
    print(write_report(runs, options.out, comparison))
    return None


def _profile_meta_layer(options: argparse.Namespace, words: list[str]) -> int | None:
    from trainer.profile_meta_layer import main as profile_main

    profile_main(options)
    return None


def _launch(options: argparse.Namespace, words: list[str]) -> int | None:
    from launch.submit import submit

    stage = {"train": ["train"], "extract": ["knowledge", "extract"]}[options.stage]
    inner = _parser().parse_args(
        [*stage, *options.arguments]
    )  # wrong ones fail here, not on a cluster
    if options.stage == "train":
        from trainer.config import load_config

        for path in inner.config:
            load_config(path, inner.set)
    pairs = [pair.partition("=") for pair in options.cfg]
    if wrong := [key for key, separator, _ in pairs if not separator]:
        raise InputError(f"--cfg {wrong[0]}: write it as --cfg option=value")
    return submit(
        options.stage,
        options.arguments,
        options.scheduler,
        options.j,
        options.dryrun,
        {key: value for key, _, value in pairs},
        options.resource,
        options.gpu,
    )


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="llm4msr",
        description="Multi-scenario recommendation lifted by a frozen language model, from log to report.",
        epilog="example: llm4msr quickstart --out quickstart",
    )
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        parent: "argparse._SubParsersAction[argparse.ArgumentParser]",
        name: str,
        run: Callable[[argparse.Namespace, list[str]], int | None],
        text: str,
        example: str,
    ) -> argparse.ArgumentParser:
        parser = parent.add_parser(
            name, help=text, description=text, epilog=f"example: llm4msr {example}"
        )
        parser.set_defaults(run=run)
        return parser

    p = command(
        commands, "quickstart", _quickstart,
        "Takes real data (MovieLens) through the whole system and compares every arm.",
        "quickstart --out quickstart",
    )  # fmt: skip
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
    p.add_argument("--processes", type=int, default=2, help="training processes (default: 2)")

    p = command(
        commands, "prepare", _prepare,
        "Turns a source into the project's interaction Parquet, split by time.",
        "prepare movielens --out data/movielens",
    )  # fmt: skip
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
        "--negatives", type=int, default=4, help="food-kitchen: sampled per positive (default: 4)"
    )
    p.add_argument("--seed", type=int, default=0, help="food-kitchen: of the sampling (default: 0)")

    p = command(
        commands, "simulate", _simulate,
        "Writes a multi-scenario log with planted truth and readable text, in constant memory.",
        "simulate --out data/simulated --users 2000 --items 1000 --scenarios 3 --events 100000 --seed 0",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="directory to create")
    for name, default in (
        ("users", 2000),
        ("items", 1000),
        ("scenarios", 3),
        ("events", 100_000),
        ("seed", 0),
    ):
        p.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")

    knowledge = commands.add_parser(
        "knowledge", help="Prompts, frozen language model, knowledge stores."
    )
    stages = knowledge.add_subparsers(title="commands", required=True, metavar="COMMAND")
    p = command(
        stages, "extract", _extract,
        "Writes prompts, reads them with a frozen language model, keeps the hidden states as a store.",
        "knowledge extract --data data/movielens --level all --out knowledge --processes 2",
    )  # fmt: skip
    p.add_argument("--processes", type=int, default=1, help="workers on this machine (default: 1)")
    from llm_knowledge.extract import add_arguments

    add_arguments(p)
    p = command(
        stages, "inspect", _inspect, "Shows a store to a human: prompt, neighbours, facts.",
        "knowledge inspect knowledge/user --key 1001",
    )  # fmt: skip
    p.add_argument("store", type=Path, help="store directory")
    p.add_argument("--key", help="look at this key")
    p = command(
        stages, "verify", _verify, "Runs every check on stores: keys, dimensions, values, checksums.",
        "knowledge verify knowledge/user knowledge/item knowledge/scenario",
    )  # fmt: skip
    p.add_argument("stores", type=Path, nargs="+", help="store directories")
    p = command(
        stages, "shuffle", _shuffle, "Writes the control of every claim: the same vectors, other keys.",
        "knowledge shuffle knowledge/user --out knowledge/user-shuffled",
    )  # fmt: skip
    p.add_argument("store", type=Path, help="store directory")
    p.add_argument("--out", type=Path, required=True, help="directory to create")
    p.add_argument("--seed", type=int, default=0, help="of the permutation (default: 0)")

    from llm_knowledge.options import add_compress_arguments, add_refresh_arguments

    p = command(
        stages, "compress", _compress,
        "Writes a smaller store: fewer dimensions, fewer bits; says what was lost.",
        "knowledge compress knowledge/user --out knowledge/user-64 --dim 64 --dtype int8",
    )  # fmt: skip
    add_compress_arguments(p)
    p = command(
        stages, "refresh", _refresh,
        "Writes the store's successor: only changed prompts are read again; forgets on request.",
        "knowledge refresh knowledge/user --data data/today --out knowledge/user-today --remove 1001",
    )  # fmt: skip
    add_refresh_arguments(p)

    p = command(
        commands, "train", _train, "Trains one run; several configurations run one after the other.",
        "train --config launch/configs/movielens.yaml --set train.seed=1 --processes 2",
    )  # fmt: skip
    p.add_argument("--config", type=Path, nargs="+", required=True, help="YAML files, one per run")
    p.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field; repeatable"
    )
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    p.add_argument(
        "--processes", type=int, default=1, help="processes on this machine (default: 1)"
    )

    p = command(
        commands, "evaluate", _evaluate,
        "Scores a split with a run's best checkpoint; exact metrics overall and per scenario.",
        "evaluate runs/star",
    )  # fmt: skip
    p.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    p.add_argument("--split", choices=["valid", "test"], default="test", help="(default: test)")
    p.add_argument("--reuse-predictions", action="store_true", help="do not score again")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a field, e.g. data.path",
    )

    p = command(
        commands, "compare", _compare,
        "Differences to the first run with paired bootstrap intervals over users and seeds.",
        "compare runs/star runs/star+llm4msr",
    )  # fmt: skip
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory, or folder of runs by seed"
    )
    p.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default: 1000)")
    p.add_argument(
        "--segment", choices=["known", "new_in_scenario", "new_user"], help="only these impressions"
    )
    p.add_argument("--out", type=Path, help="JSON file to write")

    p = command(
        commands, "report", _report, "Writes one self-contained HTML page about runs.",
        "report runs/star runs/star+llm4msr --out report.html",
    )  # fmt: skip
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory, or folder of runs by seed"
    )
    p.add_argument("--out", type=Path, default=Path("report.html"), help="(default: report.html)")

    from trainer.profile_meta_layer import add_arguments as add_meta_layer_arguments

    profile = commands.add_parser("profile", help="Where the time goes.")
    parts = profile.add_subparsers(title="commands", required=True, metavar="COMMAND")
    p = command(
        parts, "meta-layer", _profile_meta_layer,
        "Times the meta-layer op for your shapes: strategy, time, share of the machine's peak.",
        "profile meta-layer --batch 4096 --rank 32 --in-features 128 --out-features 128",
    )  # fmt: skip
    add_meta_layer_arguments(p)

    p = command(
        commands, "launch", _launch,
        "Runs a stage through a torchx scheduler; its own arguments follow --.",
        "launch train --scheduler local_cwd -j 1x2 -- --config launch/configs/movielens.yaml",
    )  # fmt: skip
    p.add_argument("stage", choices=["train", "extract"], help="what to run")
    p.add_argument("--scheduler", default="local_cwd", help="torchx scheduler (default: local_cwd)")
    p.add_argument(
        "-j", default="1x2", metavar="NxM", help="hosts x processes per host (default: 1x2)"
    )
    p.add_argument("--resource", help="named resource of a host, e.g. aws_p5.48xlarge")
    p.add_argument("--gpu", type=int, default=0, help="GPUs per host, when no resource is named")
    p.add_argument(
        "--cfg", action="append", default=[], metavar="K=V", help="option of the scheduler"
    )
    p.add_argument("--dryrun", action="store_true", help="show what would be submitted")
    return root
