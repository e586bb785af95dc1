"""What each command runs: parsed options in, an exit code (None is 0) out.

`words` is the command line itself, for commands that start ranks of themselves.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    from launch.cluster.job import JobConfig
    from trainer.config.run import RunConfig

logger = logging.getLogger(__name__)
HOSTS_MEET_SECONDS = 600


def _starts_workers(options: argparse.Namespace) -> bool:
    """Whether this process is to start ranks, each of which runs the same command."""
    return options.processes > 1 and "RANK" not in os.environ


def _run_workers(words: list[str], processes: int) -> int:
    from launch.workers import run_workers

    return run_workers("launch", words, processes)


def run_quickstart(options: argparse.Namespace, words: list[str]) -> int | None:
    """Takes MovieLens through the whole system."""
    from launch.quickstart import quickstart

    quickstart(options.out, raw=options.raw, seeds=options.seeds, processes=options.processes)
    return None


def draft_schema(options: argparse.Namespace, words: list[str]) -> int | None:
    """Drafts the schema of a log."""
    import tempfile

    from llm_knowledge.files import write_text
    from trainer.data.sources.draft import draft_schema as drafted
    from trainer.data.sources.writer import connect

    if options.out is not None and options.out.exists():
        raise InputError(f"{options.out}: is there already; give another --out, or remove it")
    base = Path("/") if options.out is None else options.out.parent
    with tempfile.TemporaryDirectory() as scratch, connect(Path(scratch)) as con:
        text = drafted(con, options.raw, options.users, options.catalogue, base)
    if options.out is None:
        print(text, end="")
        return None
    write_text(options.out, text)
    print(f"{options.out}: read it, mend it, then llm4msr prepare parquet --schema {options.out}")
    return None


def prepare(options: argparse.Namespace, words: list[str]) -> int | None:
    """Turns a source into a prepared dataset."""
    for name in ("held_out_users", "held_out_valid_users"):
        share, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if not 0 <= share < 1:
            raise InputError(f"{flag} is {share}; give a share in [0, 1)")
        if share and options.source == "parquet":
            raise InputError(f"{flag} belongs to the schema of a log: split.{name}")
    if options.held_out_users + options.held_out_valid_users >= 1:
        raise InputError("--held-out-users and --held-out-valid-users leave nobody to train on")
    if options.append_to is not None and options.source != "parquet":
        raise InputError(f"--append-to goes with prepare parquet, not with {options.source}")
    if options.negatives is not None and options.source == "movielens":
        raise InputError("--negatives goes with logs of positives alone; MovieLens has dislikes")
    if options.source == "movielens":
        from trainer.data.sources.movielens import prepare_movielens

        info = prepare_movielens(
            options.raw, options.out, options.held_out_users, options.held_out_valid_users
        )
    elif options.source == "food-kitchen":
        from trainer.data.sources.food_kitchen import prepare_food_kitchen

        info = prepare_food_kitchen(
            options.raw,
            options.out,
            negatives=4 if options.negatives is None else options.negatives,
            seed=options.seed,
            held_out_users=options.held_out_users,
            held_out_valid_users=options.held_out_valid_users,
        )
    else:
        from trainer.data.sources.parquet_log import prepare_parquet

        if options.raw is None or options.schema is None:
            raise InputError(
                "prepare parquet needs --raw (a file or folder) and --schema (a YAML file)"
            )
        if options.append_to is not None and options.negatives is not None:
            raise InputError("--negatives does not go with --append-to; prepare the whole log anew")
        if options.append_to is None:
            info = prepare_parquet(
                options.raw, options.out, options.schema, negatives=options.negatives
            )
        else:
            from trainer.data.sources.append import append_parquet

            info = append_parquet(options.raw, options.append_to, options.out, options.schema)
    print(f"{options.out}: {info.users:,} users, {info.items:,} items, rows {info.rows}")
    return None


def simulate_log(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes a simulated log."""
    from trainer.data.sources.simulate import simulate

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


def extract(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes knowledge stores."""
    if _starts_workers(options):
        return _run_workers(words, options.processes)
    from llm_knowledge.extraction.extract import main as extract_main

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        extract_main(options)
        return None
    from trainer.distributed.host_check import check_hosts
    from trainer.distributed.process_group import distributed

    # The group stays open: its store is the one that the workers of an extraction share.
    with distributed(HOSTS_MEET_SECONDS):
        check_hosts(options.out, words)
        extract_main(options)
    return None


def inspect(options: argparse.Namespace, words: list[str]) -> int | None:
    """Shows a store."""
    from llm_knowledge.store.inspect import inspect_store

    inspect_store(options.store, key=options.key)
    return None


def verify_stores(options: argparse.Namespace, words: list[str]) -> int | None:
    """Checks stores."""
    from llm_knowledge.store.dated import DatedStores, store_paths
    from llm_knowledge.store.reader import verify

    for path in options.stores:
        for store in store_paths(path):
            verify(store)
            print(f"{store}: every check passed")
            _tell_spread(store)
        DatedStores.open(path)  # those of one directory belong together
    return None


def _tell_spread(path: Path) -> None:
    """Warns of a store whose rows are nearly alike, or all the same."""
    from llm_knowledge.store.reader import KnowledgeStore
    from llm_knowledge.store.spread import spread_of

    spread = spread_of(KnowledgeStore.open(path))
    if spread is not None and spread.is_alike:
        logger.warning(
            "%s: two rows have a mean cosine of %.3f, their effective rank is %.0f: they are told apart only "
            "once centred (knowledge.centre, on by default)",
            path,
            spread.mean_cosine,
            spread.effective_rank,
        )


def shuffle_store(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes a control store."""
    from llm_knowledge.store.dated import store_paths
    from llm_knowledge.store.writer import shuffled_store

    for store in store_paths(options.store):
        out = options.out if store == options.store else options.out / store.name
        shuffled_store(store, out, options.seed, options.control)
    print(f"{options.out}: {options.control} control of {options.store}")
    return None


def compress_store(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes a smaller store."""
    from llm_knowledge.store.compress import main as compress_main

    return compress_main(options)


def refresh_store(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes a store's successor."""
    from llm_knowledge.extraction.refresh import main as refresh_main

    return refresh_main(options)


def train_runs(options: argparse.Namespace, words: list[str]) -> int | None:
    """Trains one run per configuration."""
    from trainer.config.run import load_config

    configs = [load_config(path, options.set) for path in options.config]
    if _starts_workers(options):
        return _run_workers(words, options.processes)
    from trainer.distributed.process_group import distributed
    from trainer.training.loop import train

    # One process group for all runs: a second one would find the first one's keys in the store.
    with distributed(configs[0].train.timeout_seconds) as runtime:
        for config in configs:
            folder = train(config, resume=options.resume)
            if runtime.is_main:
                print(f"{folder}: {_in_one_line(folder / 'summary.json')}", flush=True)
    return None


def _in_one_line(summary: Path) -> str:
    """What a run has come to."""
    run = json.loads(summary.read_text(encoding="utf-8"))
    auc = "undefined" if run["valid_auc"] is None else f"{run['valid_auc']:.4f}"
    return (
        f"{run['steps']} steps in {run['wall_seconds']:.0f} s, best by {run['selected_by'] or 'age'} at "
        f"{run['best_step']}: valid AUC {auc}"
    )


def plan_tables(options: argparse.Namespace, words: list[str]) -> int | None:
    """Plans tables on a cluster that is not there."""
    for name in ("nodes", "gpus_per_node", "hbm_gib", "batch_per_rank"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be greater than 0")
    from trainer.planning.plan import plan_absent
    from trainer.planning.problem import problem_of_config, problem_of_file
    from trainer.run.hardware import Cluster

    read = problem_of_file if options.tables else problem_of_config
    cluster = Cluster(options.nodes, options.gpus_per_node, options.device)
    source = options.tables or options.config
    plan_absent(
        read(source, options.set, cluster, options.batch_per_rank, options.hbm_gib), options.out
    )
    return None


def evaluate_run(options: argparse.Namespace, words: list[str]) -> int | None:
    """Scores a split and measures it."""
    from trainer.evaluation.metrics import write_evaluation

    if not options.reuse_predictions:
        from trainer.training.scoring import predict

        predict(options.run_dir, options.split, options.set)
        if os.environ.get("RANK", "0") != "0":
            return None  # every rank has written its part; one measures them all
    data = None
    if options.set:
        from trainer.config.run import load_config
        from trainer.training.resume import check_data

        config = load_config(options.run_dir / "config.yaml", options.set)
        check_data(config.data.path, options.run_dir)
        data = Path(config.data.path)
    print(json.dumps(write_evaluation(options.run_dir, options.split, data), indent=1))
    return None


def compare_runs(options: argparse.Namespace, words: list[str]) -> int | None:
    """Compares runs with the first."""
    from trainer.evaluation.compare import compare, format_table, write_comparison
    from trainer.evaluation.predictions import group_runs

    result = compare(group_runs(options.runs), samples=options.samples, segment=options.segment)
    print(format_table(result))
    if options.out:
        write_comparison(result, options.out)
    return None


def report_on_runs(options: argparse.Namespace, words: list[str]) -> int | None:
    """Writes the HTML page."""
    from trainer.evaluation.compare import compare
    from trainer.evaluation.predictions import group_runs, resolve_runs
    from trainer.report.page import write_report

    groups = group_runs(options.runs)
    comparison = compare(groups) if len(groups) > 1 else None
    runs = [run for path in options.runs for run in resolve_runs(path)]
    print(write_report(runs, options.out, comparison))
    return None


def profile_meta_layer(options: argparse.Namespace, words: list[str]) -> int | None:
    """Times the meta-layer op."""
    from trainer.profiling.meta_layer import main as profile_main

    profile_main(options)
    return None


def profile_embeddings(options: argparse.Namespace, words: list[str]) -> int | None:
    """Times the phases of embedding lookups."""
    from trainer.profiling.embeddings import check_measuring_arguments
    from trainer.profiling.embeddings import main as profile_main

    check_measuring_arguments(options)
    if _starts_workers(options):
        return _run_workers(words, options.processes)
    return profile_main(options)


def profile_train(options: argparse.Namespace, words: list[str]) -> int | None:
    """Times the phases of a training step."""
    from trainer.profiling.embeddings import check_measuring_arguments
    from trainer.profiling.train import main as profile_main

    check_measuring_arguments(options)
    if _starts_workers(options):
        return _run_workers(words, options.processes)
    profile_main(options)
    return None


def run_pipeline(options: argparse.Namespace, words: list[str]) -> int | None:
    """Runs the stages of a run in order."""
    from trainer.config.run import load_config

    config = load_config(options.config, options.set)
    if _starts_workers(options):
        return _run_workers(words, options.processes)
    from launch.pipeline import pipeline

    report = pipeline(config, options.extract)
    if os.environ.get("RANK", "0") == "0":
        print(report)
    return None


def launch_stage(options: argparse.Namespace, words: list[str]) -> int | None:
    """Submits a stage through torchx."""
    from launch.cluster.job import load_job
    from launch.cluster.submit import submit

    if wrong := [pair for pair in options.cfg if "=" not in pair]:
        raise InputError(f"--cfg {wrong[0]}: write it as --cfg option=value")
    pairs = [pair.partition("=") for pair in options.cfg]
    scheduler_options = [f"options.{key}={json.dumps(value)}" for key, _, value in pairs]
    job = load_job(
        options.job,
        [*options.set, *scheduler_options],
        scheduler=options.scheduler,
        hosts=options.j,
        resource=options.resource,
        image=options.image,
    )
    stage = {"extract": ["knowledge", "extract"]}.get(options.stage, [options.stage])
    # Wrong arguments fail here, not on a cluster.
    of_stage = options.parser.parse_args([*stage, *options.arguments])
    if getattr(of_stage, "processes", 1) != 1:
        raise InputError(
            f"--processes {of_stage.processes}: the job starts the processes; say how many by -j HOSTSxN"
        )
    if options.stage in ("train", "pipeline"):
        from trainer.config.run import load_config

        for path in of_stage.config if options.stage == "train" else [of_stage.config]:
            _check_ranks(load_config(path, of_stage.set), job)
    return submit(options.stage, options.arguments, job, options.dryrun)


def _check_ranks(config: "RunConfig", job: "JobConfig") -> None:
    """Checks that a run can be shared among the ranks of a job, which would find out one by one."""
    from trainer.data.loading.loader import check_shares

    fewest, most, processes = job.size
    for hosts in range(fewest, most + 1):
        ranks = hosts * processes
        try:
            check_shares(config.train.global_batch_size, config.data.streams, ranks)
        except InputError as error:
            if hosts in (fewest, most):
                raise InputError(f"hosts {job.hosts}, which is {ranks} ranks: {error}") from None
            logger.warning("hosts %s: a job of %d hosts would stop: %s", job.hosts, hosts, error)
