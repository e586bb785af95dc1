"""Training, top to bottom: build, loop, evaluate, save. One process or a thousand."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from trainer.checkpoint.directory import LoopState, best_of, checkpoints
from trainer.checkpoint.restore import load_checkpoint, restore_newest
from trainer.checkpoint.warm_start import find_start, warm_start
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.run import RunConfig
from trainer.data.loading.batch import Batch
from trainer.data.loading.loader import EventStream
from trainer.data.loading.prefetch import BatchFeed
from trainer.distributed.host_check import check_hosts
from trainer.distributed.process_group import distributed, seed_step, tell, together
from trainer.observe.anomalies import Fault, Guard
from trainer.observe.metrics_log import RunLog
from trainer.observe.trace import Tracer
from trainer.observe.trackers import check_trackers
from trainer.observe.watchdog import Preempted, Watch
from trainer.run.build import build
from trainer.run.id_tables import collision_rates
from trainer.run.inputs import open_inputs
from trainer.run.session import Continuation, Run
from trainer.training.resume import find_continuation
from trainer.training.run_folder import prepare_folder, write_plan
from trainer.training.schedule import set_learning_rates
from trainer.training.scoring import measure, write_predictions


def train(config: RunConfig, resume: bool = False) -> Path:
    """Trains one run and writes its predictions for the test split.

    Args:
        config: The run.
        resume: Continue from the newest checkpoint of `config.output`, if there is one.

    Returns:
        The run directory.

    Raises:
        InputError: If configuration, data and stores do not fit together.
    """
    began = time.perf_counter()
    with distributed(config.train.timeout_seconds) as runtime:
        check_hosts(Path(config.output), config.model_dump())
        together(lambda: check_trackers(config))
        inputs = together(lambda: open_inputs(config, runtime))
        since = together(lambda: find_continuation(config, inputs.dataset))
        start = config.train.start_from
        if start is not None and not checkpoints(Path(config.output) / "checkpoints"):
            together(lambda: find_start(Path(start)))
        folder = together(lambda: prepare_folder(config, runtime, resume))
        run = build(config, runtime, folder, inputs)
        if runtime.is_main:
            write_plan(run)
            print(run.plan, file=sys.stderr)
        state = fit(run, since)
        load_checkpoint(best_of(folder / "checkpoints", state), run)
        write_predictions(run, "test")
        ids = run.report_ids(scored=False) | run.report_ids(scored=True)
        if runtime.is_main:
            summary = {
                "steps": state.step,
                "best_step": state.best_step,
                "valid_auc": state.best_auc,
                "wall_seconds": round(time.perf_counter() - began, 2),
                "world_size": runtime.world_size,
                "ids": ids | collision_rates(config),
            }
            (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        dist.barrier()
    return folder


def fit(run: Run, since: Continuation | None = None) -> LoopState:
    """Runs the loop until the last epoch or until the valid split stops improving.

    Raises:
        Preempted: The job was told to end, and a checkpoint of its last step is written.
    """
    options, folder = run.config.train, run.folder / "checkpoints"
    events = run.stream(list(run.config.data.train_splits), shuffle=True, since=since)
    valid = run.stream(["valid"], shuffle=False)
    total = options.epochs * events.steps
    found = restore_newest(run, folder)
    if found is None and since is not None:
        load_checkpoint(since.checkpoint, run)
    elif found is None and options.start_from is not None:
        warm_start(run, Path(options.start_from))
    state = found or LoopState()

    bar = tqdm(
        total=total, initial=state.step, unit="step", desc=run.config.name, leave=False,
        disable=not run.runtime.is_main or not sys.stderr.isatty(),
    )  # fmt: skip
    timeout, grace = options.timeout_seconds, options.grace_seconds
    hang = options.hang_seconds or timeout / 2
    with (
        Watch(run.folder, run.runtime, hang, grace, give_up_seconds=2 * timeout) as watch,
        Guard(run) as guard,
        bar,
        CheckpointWriter(run, folder) as writer,
    ):
        watch.follow(run.model)
        if found is None and guard.may_roll_back:
            writer.save(state)
        while not state.finished:
            with (
                RunLog(run, state.step) as log,
                events.feed(state.step, total) as feed,
            ):
                loop = Loop(run, feed, log, bar, watch, guard, total, Tracer(run))
                fault = _go_on(loop, valid, state, writer)
            if fault is not None:
                writer.wait()
                before, state = state, restore_newest(run, folder) or LoopState()
                state.left_out = sorted({*before.left_out, *state.left_out, *fault.steps})
                bar.update(state.step - bar.n)
    return state


def _go_on(
    loop: "Loop", valid: EventStream, state: LoopState, writer: CheckpointWriter
) -> Fault | None:
    """Trains, evaluates and saves until the run is finished, or a fault is to be rolled back."""
    options, total = loop.run.config.train, loop.total
    per_epoch = total // options.epochs
    while not state.finished:
        # The pipeline reads ahead, so it is drained before anything else may happen.
        stop = min(
            _next(state.step, options.eval_every),
            _next(state.step, options.checkpoint_every),
            total,
        )
        loop.train(state, stop)
        if fault := loop.fault or loop.guard.check_state(state.step):
            return fault
        improved = False
        if state.step % options.eval_every == 0 or state.step == total:
            improved = _evaluate(loop.run, valid, state, loop.log, state.step // per_epoch)
            patient = state.evaluations_without_gain < options.patience
            state.finished = state.step == total or not patient
        due = improved or state.finished or state.step % options.checkpoint_every == 0
        if due or loop.ended:
            writer.save(state)
        if loop.ended and not state.finished:
            writer.wait()
            if loop.run.runtime.is_main:
                tell(f"told to end: step {state.step} is saved; --resume goes on from there")
            raise Preempted
    return None


def _evaluate(run: Run, valid: EventStream, state: LoopState, log: RunLog, epoch: int) -> bool:
    """Measures the valid split; returns whether it is the best so far."""
    auc, logloss = measure(run, valid)
    ids = run.report_ids(scored=True)
    log.write("valid", state.step, epoch, valid_auc=auc, valid_logloss=logloss, **ids)
    state.auc = auc
    if run.runtime.is_main and not sys.stderr.isatty():  # no bar: a log gets lines
        shown = "undefined" if auc is None else f"{auc:.4f}"
        tell(
            f"{run.config.name}: step {state.step}, epoch {epoch}: valid AUC {shown}, "
            f"logloss {logloss:.4f}"
        )
    improved = auc is not None and (state.best_auc is None or auc > state.best_auc)
    state.evaluations_without_gain = 0 if improved else state.evaluations_without_gain + 1
    if improved or state.best_step == 0:
        state.best_auc, state.best_step = auc, state.step
    return improved


@dataclass
class Loop:
    """What training steps need; `ended` once a rank was told to end, `fault` once one is rolled back."""

    run: Run
    feed: BatchFeed[Batch]
    log: RunLog
    bar: tqdm
    watch: Watch
    guard: Guard
    total: int
    tracer: Tracer
    ended: bool = False
    fault: Fault | None = None

    def train(self, state: LoopState, stop: int) -> None:
        """Trains until step `stop`, or until all ranks agree to break off; no batch is then under way."""
        run, train = self.run, self.run.config.train
        run.model.train()
        per_epoch = self.total // train.epochs
        begin = state.step
        steps = [step for step in range(begin, stop) if step not in state.left_out]

        def read() -> Iterator[Batch]:
            for step, batch in zip(range(begin, stop), self.feed, strict=False):
                if step in state.left_out:
                    continue
                yield batch
                if self.ended or self.fault:  # what was read ahead is still trained
                    return

        batches, rates = run.give_rows(read(), learn=True), {}
        for step in steps:
            seed_step(train.seed, run.runtime.rank, step)
            rates = set_learning_rates(run, step, self.total)
            try:
                predictions = run.pipeline.progress(batches)
            except StopIteration:
                break
            state.step = step + 1
            state.epoch, state.auc = state.step // per_epoch, None
            self.tracer.step()
            self.log.add(step, predictions, self.guard.norm)
            self.bar.update()
            if state.step % train.log_every == 0 or step == steps[-1] or self.log.full:
                self._flush(state, rates)
        else:
            state.step = stop  # steps left out at the end are done, too
        self.tracer.end()  # evaluations are not part of it
        if self.log.pending:
            self._flush(state, rates)

    def _flush(self, state: LoopState, rates: dict[str, float]) -> None:
        """Exchanges numbers with the other ranks, and looks at them."""
        rates = rates | self.run.report_ids(scored=False)
        self.log.flush(
            state.step, state.epoch, rates, self.bar, self.feed, self.watch, self.guard.checksum()
        )
        window = self.log.window
        if window.ranks["trace"].any():
            self.watch.trace_wanted = False
            self.tracer.begin(state.step)
        self.ended |= bool(window.ranks["told_to_end"].any())
        self.fault = self.fault or self.guard.look(window)


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every
