"""Does the knowledge help? Trains every arm on every data set and writes small tables.

    python -m benchmarks.quality run --work study --datasets movielens --backbones star shared_bottom
    python -m benchmarks.quality sensitivity --work study --datasets movielens
    python -m benchmarks.quality regularisation --work study --datasets movielens
    python -m benchmarks.quality tables --work study

`run` is resumable: what is there is not done again. `tables` reads whatever has been run.
"""

import argparse
import time
from pathlib import Path

from benchmarks.quality import regularisation, sensitivity, study, tables
from benchmarks.quality.arms import ARMS, DATASETS, MAIN, REGULARISED, SEEDS
from trainer.models import BACKBONES


def main() -> None:
    """Parses the command line and runs the stage."""
    options = _parser().parse_args()
    if options.stage == "tables":
        tables.write(options.work, options.out, options.pages, options.jobs)
    elif options.stage == "sensitivity":
        for name in options.datasets:
            study.train(sensitivity.plan(options.work, name, options.backbone), options.jobs)
    elif options.stage == "regularisation":
        for name in options.datasets:
            _regularise(options, name)
    else:
        _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    run = stages.add_parser("run", help="prepare, extract, tune, train")
    run.add_argument("--work", type=Path, required=True, help="folder of data, stores and runs")
    run.add_argument("--raw", type=Path, help="folder with the data sets' raw files")
    run.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    run.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    run.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(MAIN))
    run.add_argument("--seeds", type=int, default=SEEDS)
    run.add_argument("--jobs", type=int, default=2, help="runs at a time, one process each")
    run.add_argument("--minutes", type=float, default=1e9, help="start nothing new after these")
    curve = stages.add_parser("sensitivity", help="AUC by the meta networks' step size and form")
    again = stages.add_parser("regularisation", help="tunes dropout and the like for every arm")
    curve.add_argument("--backbone", choices=list(BACKBONES), default="shared_bottom")
    again.add_argument("--backbones", nargs="*", choices=list(BACKBONES), default=list(BACKBONES))
    again.add_argument("--arms", nargs="+", choices=REGULARISED, default=list(REGULARISED))
    for stage in (curve, again):
        stage.add_argument("--work", type=Path, required=True, help="that `run` has filled")
        stage.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
        stage.add_argument("--jobs", type=int, default=2, help="runs at a time, one process each")
    table = stages.add_parser("tables", help="CSV files and figures of what has been run")
    table.add_argument("--work", type=Path, required=True)
    table.add_argument("--out", type=Path, default=Path("docs/results/study"))
    table.add_argument("--pages", type=Path, default=Path("docs/results"))
    table.add_argument("--jobs", type=int, default=2, help="processes that resample")
    return parser


def _regularise(options: argparse.Namespace, name: str) -> None:
    """Tunes every arm on a data set, then trains all seeds of what was chosen."""
    regularisation.check(options.work, name, options.arms)
    regularisation.make_data(options.work, name)
    tried = [run for arm in options.arms for run in regularisation.trials(options.work, name, arm)]
    study.train(tried, options.jobs)
    settings = regularisation.chosen(options.work, name)
    runs = [
        run
        for backbone in options.backbones
        for arm in options.arms
        if study.has_tried(options.work, name, backbone, arm)  # else it has no step sizes
        for run in regularisation.seeds(options.work, name, backbone, arm, settings[arm])
    ]
    study.train(runs, options.jobs)


def _run(options: argparse.Namespace) -> None:
    """Prepares, extracts, tunes and trains, until the time is over."""
    ends = time.monotonic() + 60 * options.minutes
    folders = {"movielens": "ml-latest-small", "food_kitchen": "amazon-food-kitchen"}
    kinds = {pair for arm in options.arms for pair in ARMS[arm].stores.items()}
    for name in options.datasets:
        raw = options.raw / folders[name] if options.raw and name in folders else None
        study.make_data(options.work, name, raw)
        study.make_stores(options.work, name, kinds, options.jobs)
        cells = [(name, backbone, arm) for backbone in options.backbones for arm in options.arms]
        # An arm that is tuned as another one needs that one's trials.
        for turn in (
            [cell for cell in cells if not ARMS[cell[2]].tuned_as],
            [cell for cell in cells if ARMS[cell[2]].tuned_as],
        ):
            if not study.train_cells(options.work, turn, options.seeds, options.jobs, ends):
                return


if __name__ == "__main__":
    main()
