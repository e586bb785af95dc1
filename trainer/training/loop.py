"""Training, top to bottom: set up, the loop, the best model's predictions. One process or a thousand."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from llm_knowledge.files import write_json
from trainer.checkpoint.directory import best_of, checkpoints
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint, restore_newest
from trainer.checkpoint.warm_start import find_start, warm_start
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.run import RunConfig
from trainer.data.loading.batch import Batch
from trainer.data.loading.loader import EventStream
from trainer.data.loading.prefetch import BatchFeed
from trainer.distributed.host_check import check_hosts
from trainer.distributed.process_group import Runtime, distributed, on_all_ranks, seed_step
from trainer.observe.anomalies import Fault, Guard, keep_from_tables
from trainer.observe.metrics_log import RunLog
from trainer.observe.trace import Tracer
from trainer.observe.trackers import check_trackers
from trainer.observe.watchdog import Preempted, Watch
from trainer.run.build import build
from trainer.run.id_tables import collision_rates
from trainer.run.inputs import open_inputs
from trainer.run.means import prepare_means, run_of
from trainer.run.session import Continuation, Run
from trainer.training.resume import find_continuation
from trainer.training.run_folder import prepare_folder, run_owner, write_plan
from trainer.training.schedule import set_learning_rates
from trainer.training.scoring import write_predictions
from trainer.training.validation import measure

logger = logging.getLogger(__name__)


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
    with distributed(config.train.timeout_seconds) as runtime, ExitStack() as held:
        run, since = _set_up(config, runtime, resume, held)
        state = fit(run, since)
        load_checkpoint(best_of(run.folder / "checkpoints", state), run)
        write_predictions(run, "test")
        _write_summary(run, state, began)
        dist.barrier()
    return run.folder


def fit(run: Run, since: Continuation | None = None) -> LoopState:
    """Trains until the last epoch, or until the valid split stops improving; rolls back where it must.

    Raises:
        Preempted: The job was told to end, and a checkpoint of its last step is written.
    """
    options, folder = run.config.train, run.folder / "checkpoints"
    events = run.stream(run.config.data.train_splits, shuffle=True, since=since)
    valid = run.stream(["valid"], shuffle=False)
    total = options.epochs * events.steps
    resumed = restore_newest(run, folder)
    if resumed is None and since is not None:
        load_checkpoint(since.checkpoint, run)
    elif resumed is None and options.start_from is not None:
        warm_start(run, Path(options.start_from))
    state = resumed or LoopState()
    with (
        Watch(run.folder, run.runtime, options) as watch,
        _progress_bar(run, state.step, total) as bar,
        CheckpointWriter(run, folder) as writer,
    ):
        guard = Guard(run)
        if resumed is None and guard.may_roll_back:
            writer.save(state)
        with _hooks(run, watch, guard):
            while not state.finished:
                with RunLog(run, state.step) as log, events.feed(state.step, total) as feed:
                    loop = Loop(run, feed, valid, total, log, bar, watch, guard, writer)
                    fault = loop.train(state)
                if fault is not None:
                    writer.wait()
                    earlier = restore_newest(run, folder) or LoopState()
                    earlier.leave_out((*state.left_out, *fault.steps))
                    state = earlier
                    bar.update(state.step - bar.n)
    return state


@contextmanager
def _hooks(run: Run, watch: Watch, guard: Guard) -> Iterator[None]:
    """Everything that runs within a step without being called by the loop, in one list.

    What belongs to the model itself is registered where it is built: the step of replicated tables and
    the average over groups of ranks follow every step of the dense optimizer.
    """
    handles = [
        run.model.register_forward_pre_hook(watch.progress),  # every batch, trained or scored
        run.optimizer.register_step_pre_hook(guard.before_update),
    ]
    if guard.skips:
        handles.append(run.model.module.dense.register_forward_pre_hook(keep_from_tables))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Loop:
    """The steps of a run and what is done once in a while between them."""

    run: Run
    feed: BatchFeed[Batch]
    valid: EventStream
    total: int
    log: RunLog
    bar: tqdm
    watch: Watch
    guard: Guard
    writer: CheckpointWriter
    told_to_end: bool = False  # by one rank, known to all since they exchanged their numbers
    fault: Fault | None = None  # to be rolled back, likewise

    def train(self, state: LoopState) -> Fault | None:
        """Trains from `state` on until the run is finished.

        Returns:
            A fault, if the run is to be rolled back; None if it is finished.

        Raises:
            InputError: On all ranks, if the input of any failed, or the guard's policy is to stop.
            Preempted: The job was told to end; its last step is saved.
        """
        run, options, log, guard = self.run, self.run.config.train, self.log, self.guard
        steps_per_epoch, tracer = self.total // options.epochs, Tracer(run)
        while not state.finished:
            # The pipeline reads ahead, so it is fed up to the next evaluation or checkpoint only: no
            # batch is under way there.
            stop = min(
                _next(state.step, options.eval_every),
                _next(state.step, options.checkpoint_every),
                self.total,
            )
            steps = [step for step in range(state.step, stop) if step not in state.left_out]
            batches = run.remap_ids(self._batches(state, stop), assign=True)
            run.model.train()
            for step in steps:
                seed_step(options.seed, run.runtime.rank, step)
                rates = set_learning_rates(run, step, self.total)
                # Forward, backward with the tables' updates, `_hooks`, the dense optimizer's update;
                # the next batches are read and their ids travel meanwhile.
                predictions = run.train_step(batches)
                if predictions is None:  # broken off: what was read ahead is trained
                    break
                state.count_step(step, steps_per_epoch)
                tracer.step()
                log.add(step, predictions, guard.norm)
                self.bar.update()
                if state.step % options.log_every == 0 or step == steps[-1] or log.full:
                    self._exchange(state, rates, tracer)
            else:  # steps left out at the end are done, too
                state.count_step(stop - 1, steps_per_epoch)
            tracer.end()  # evaluations are not part of it
            if log.pending:
                self._exchange(state, rates, tracer)

            if fault := self.fault or guard.check_state(state.step):
                return fault
            improved = False
            if state.step % options.eval_every == 0 or state.step == self.total:
                improved = self._evaluate(state, state.step // steps_per_epoch)
                state.finish_if_done(self.total, options.patience)
            due = improved or state.finished or state.step % options.checkpoint_every == 0
            if due or self.told_to_end:
                self.writer.save(state)
            if self.told_to_end and not state.finished:
                self.writer.wait()
                logger.info(
                    "told to end: step %d is saved; --resume goes on from there", state.step
                )
                raise Preempted
        return None

    def _batches(self, state: LoopState, stop: int) -> Iterator[Batch]:
        """The batches of the steps up to `stop`, without those left out; ends early to break off."""
        for step, batch in zip(range(state.step, stop), self.feed, strict=False):
            if step in state.left_out:
                continue
            yield batch
            if self.told_to_end or self.fault:  # what was read ahead is still trained
                return

    def _exchange(self, state: LoopState, rates: dict[str, float], tracer: Tracer) -> None:
        """Exchanges the numbers of the steps since the last time with all ranks, and acts on them."""
        ids = self.run.report_ids(scored=False)
        window = self.log.exchange(state.step, self.feed, self.watch, self.guard.checksum())
        if window.any_rank("no_input"):
            on_all_ranks(self.feed.check)
        numbers = self.log.write_window(window, state.epoch, rates | ids)
        self.bar.set_postfix(
            loss=f"{numbers['loss']:.4f}", samples_s=f"{numbers['samples_per_second']:.0f}"
        )
        if window.any_rank("trace"):
            self.watch.trace_wanted = False
            tracer.begin(state.step)
        self.told_to_end |= window.any_rank("told_to_end")
        self.fault = self.fault or self.guard.check(window)

    def _evaluate(self, state: LoopState, epoch: int) -> bool:
        """Measures the valid split; returns whether it is the best so far."""
        select_by = self.run.config.train.select_by
        valid = measure(self.run, self.valid, "valid" if select_by == "gauc" else None)
        numbers = {
            "valid_auc": valid.auc,
            "valid_logloss": valid.logloss,
            "valid_normalised_entropy": valid.normalised_entropy,
        }
        if select_by == "gauc":
            numbers["valid_gauc"] = valid.gauc
        ids = self.run.report_ids(scored=True)
        self.log.write("valid", state.step, epoch, **numbers, **ids)
        if self.bar.disable:  # no bar: a log gets lines
            shown = ["undefined" if value is None else f"{value:.4f}" for value in numbers.values()]
            logger.info(
                "%s: step %d, epoch %d: valid AUC %s, logloss %s, normalised entropy %s%s",
                self.run.config.name,
                state.step,
                epoch,
                *shown[:3],
                f", GAUC {shown[3]}" if select_by == "gauc" else "",
            )
        return state.record_evaluation(
            valid.criterion(select_by), valid.auc, valid.normalised_entropy
        )


def _set_up(
    config: RunConfig, runtime: Runtime, resume: bool, held: ExitStack
) -> tuple[Run, Continuation | None]:
    """Checks what can be checked before anything is written, then builds the run.

    The run's directory belongs to this training until `held` is closed.
    """
    check_hosts(Path(config.output), config.model_dump())
    on_all_ranks(lambda: check_trackers(config.train.trackers))
    inputs = on_all_ranks(lambda: open_inputs(config, runtime))
    since = on_all_ranks(
        lambda: find_continuation(config.train.continue_from, config.data, inputs.dataset)
    )
    start = config.train.start_from
    if start is not None and not checkpoints(Path(config.output) / "checkpoints"):
        on_all_ranks(lambda: find_start(Path(start)))
    held.enter_context(run_owner(Path(config.output), runtime))
    begins_with = config.train.continue_from or config.train.start_from

    def prepare() -> Path:
        if runtime.is_main:  # before config.yaml, which says that the run is there
            earlier = None if begins_with is None else run_of(Path(begins_with))
            centre = config.knowledge.centre
            prepare_means(Path(config.output), inputs.stores, centre, earlier)
        return prepare_folder(config, runtime, resume)

    folder = on_all_ranks(prepare)
    run = build(config, runtime, folder, inputs)
    if runtime.is_main:
        write_plan(run)
    return run, since


def _write_summary(run: Run, state: LoopState, began: float) -> None:
    """Writes what became of a run; with this file it is complete."""
    ids = run.report_ids(scored=False) | run.report_ids(scored=True)
    if run.runtime.is_main:
        summary = {
            "steps": state.step,
            "best_step": state.best_step or state.step,
            "selected_by": state.best_by,
            "valid_auc": state.best_auc,
            "valid_normalised_entropy": state.best_normalised_entropy,
            "wall_seconds": round(time.perf_counter() - began, 2),
            "world_size": run.runtime.world_size,
            "ids": ids | collision_rates(run.config.tables.hash_rows, run.config.data),
        }
        write_json(run.folder / "summary.json", summary)
        if (state.best_normalised_entropy or 0) > 1:
            logger.warning(
                "%s: the chosen model's normalised entropy on valid is %.3f: its probabilities are worse "
                "than the mean label rate for all; train.select_by: logloss chooses by probabilities",
                run.config.name,
                state.best_normalised_entropy,
            )


def _progress_bar(run: Run, step: int, total: int) -> tqdm:
    return tqdm(
        total=total,
        initial=step,
        unit="step",
        desc=run.config.name,
        leave=False,
        disable=not run.runtime.is_main or not sys.stderr.isatty(),
    )


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every
