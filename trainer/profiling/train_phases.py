"""The phases of a training step, one after the other, and whole steps as training runs them."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._pytree import tree_leaves, tree_map
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from embeddings.profiling.measure import Clock, machine, summary
from embeddings.profiling.measure_tables import gather
from embeddings.versions import versions
from trainer.data.loading.batch import Batch
from trainer.run.session import Run

COMPUTE = ("copy", "lookup", "dense forward", "dense backward", "table update", "optimizer")
COMMUNICATION = (
    "sparse distribution",
    "output distribution",
    "output gradients",
    "dense gradients",
)
PHASES = (
    "loader",
    "copy",
    "sparse distribution",
    "lookup",
    "output distribution",
    "dense forward",
    "dense backward",
    "dense gradients",
    "output gradients",
    "table update",
    "optimizer",
)
META = ("meta layers forward", "meta layers backward")  # parts of dense forward and backward
SEGMENTS = 5  # of steps with the loader in, and as many with it out, in turn


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def profile_train(run: Run, rounds: int, warmup: int, trace: Path | None = None) -> dict[str, Any]:
    """Measures a built run, which is trained on the way.

    Args:
        run: Of `trainer.run.build.build`.
        rounds: Serial steps that are measured, and steps of each pipelined segment.
        warmup: Steps of each kind before, not counted.
        trace: Rank 0 writes a Chrome trace of two more pipelined steps here.

    Returns:
        On every rank; times in ms of the slowest rank: "phases" (a step without any overlap),
        "step" (pipelined, loader out), "exposed_communication", "samples_per_second".

    Raises:
        InputError: If the data cannot be read.
    """
    seconds, segments = _measure(run, rounds, warmup, trace)
    slowest = [
        {name: max(rank[number][name] for rank in everywhere) for name in seconds[number]}
        for everywhere in [gather(seconds)]
        for number in range(rounds)
    ]
    phases = {
        name: summary([1e3 * timings[name] for timings in slowest]) for name in (*PHASES, *META)
    }
    segments_of_ranks = gather(segments)
    steps = {
        name: [
            1e3 * max(rank[name][number] for rank in segments_of_ranks) / rounds
            for number in range(SEGMENTS)
        ]
        for name in segments
    }
    return {
        "machine": machine(),
        "versions": versions(),
        "device": run.runtime.device.type,
        "ranks": run.runtime.world_size,
        "rounds": rounds,
        "warmup": warmup,
        "torch_threads": torch.get_num_threads(),
        "order": PHASES,
        "meta": META,
        **_report(phases, steps, run.config.train.global_batch_size),
    }


def _measure(
    run: Run, rounds: int, warmup: int, trace: Path | None
) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """This rank's seconds of the phases of every serial step, and of the pipelined segments."""
    needed = warmup + rounds + (SEGMENTS + 1) * rounds + 2
    events = run.stream(list(run.config.data.train_splits), shuffle=True)
    clock = Clock(run.runtime.device)
    run.model.train()
    with events.feed(0, needed) as source:
        feed = run.remap_ids(source, assign=True)
        seconds_here: list[dict[str, float]] = []
        for number in range(warmup + rounds):
            timings = SerialStep(run, clock)(feed)
            if number >= warmup:
                seconds_here.append(timings)
        held = list(itertools.islice(feed, rounds))
        segments = pipelined(run, feed, held, rounds, clock)
        source.check()
        if trace is not None:
            write_trace(run, iter(held[:2]), trace)
    return seconds_here, segments


def _report(
    phases: dict[str, dict[str, float]], steps: dict[str, list[float]], samples: int
) -> dict[str, Any]:
    """What the times in ms of phases and pipelined steps, of `samples` each, come to."""
    compute = sum(phases[name]["median"] for name in COMPUTE)
    communication = sum(phases[name]["median"] for name in COMMUNICATION)
    step = summary(steps["loader out"])
    ratio = [
        out / inside for out, inside in zip(steps["loader out"], steps["loader in"], strict=True)
    ]
    return {
        "global_batch_size": samples,
        "phases": phases,
        "serial_step": sum(phases[name]["median"] for name in PHASES),
        "compute": compute,
        "communication": communication,
        "step": step,
        "exposed_communication": max(step["median"] - compute, 0.0),
        "samples_per_second": {
            name: summary([1e3 * samples / ms for ms in values]) for name, values in steps.items()
        },
        "loader_in_over_out": summary(ratio),
    }


class SerialStep:
    """One training step whose phases wait for each other; `seconds` of each. It trains as any other."""

    def __init__(self, run: Run, clock: Clock) -> None:
        self.seconds: dict[str, float] = {}
        self._run, self._clock = run, clock
        self._model = run.model.module
        self._caught: list[Call] = []

    def __call__(self, feed: Iterator[Batch]) -> dict[str, float]:
        """Takes a batch and trains on it."""
        batch = self._timed("loader", lambda: next(feed))
        batch = self._timed("copy", lambda: batch.to(self._run.runtime.device, non_blocking=True))
        self._embed(batch)
        self._dense(batch)
        self._send_gradients_back()
        self._timed("optimizer", self._run.optimizer.step)
        return self.seconds | replay(self._caught, self._clock)

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        if name in COMMUNICATION:
            dist.barrier()
        began = self._clock.start()
        result = call()
        self.seconds[name] = self._clock.stop(began)[0]
        return result

    def _embed(self, batch: Batch) -> None:
        """Lookups; every result is cut off from what made it, so that gradients can wait as well."""
        model = self._model
        inputs = [(model.sparse.pooled, batch.ids)]
        inputs += [(collection, batch.ids) for collection in model.sparse.sequence_collections]
        if model.sparse.weighted is not None:
            inputs.append((model.sparse.weighted, batch.weighted))
        self._trained = len(inputs)
        if model.knowledge is not None:
            inputs.append((model.knowledge.collection, batch.knowledge))
        contexts = [module.create_context() for module, _ in inputs]
        rows = self._timed(
            "sparse distribution",
            lambda: [
                module.input_dist(context, ids).wait().wait()
                for (module, ids), context in zip(inputs, contexts, strict=True)
            ],
        )

        def look_up() -> list[list[Tensor]]:
            vectors = []
            for number, (module, _) in enumerate(inputs):
                with torch.set_grad_enabled(number < self._trained):
                    vectors.append(module.compute(contexts[number], rows[number]))
            return vectors

        self._vectors = self._timed("lookup", look_up)
        self._sent = [[_leaf(vector) for vector in of_module] for of_module in self._vectors]
        self._outputs = self._timed(
            "output distribution",
            lambda: [
                module.output_dist(context, sent).wait()
                for (module, _), context, sent in zip(inputs, contexts, self._sent, strict=True)
            ],
        )

    def _dense(self, batch: Batch) -> None:
        dense, optimizer = self._model.dense, self._run.optimizer
        self._used = [_leaves(output) for output in self._outputs]
        known = self._used[self._trained] if len(self._used) > self._trained else None
        if known is not None:
            known = KeyedTensor(known.keys(), known.length_per_key(), known.values().detach())

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._caught.append((module, args, kwargs))

        parts = list(dense.meta.children()) if dense.meta is not None else []
        hooks = [part.register_forward_pre_hook(catch, with_kwargs=True) for part in parts]
        last = 1 + len(self._model.sparse.sequence_collections)
        further = self._used[2:last]
        weighted = self._used[last] if self._trained > last else None
        loss, _ = self._timed(
            "dense forward", lambda: dense(*self._used[:2], known, batch, weighted, further)
        )
        for hook in hooks:
            hook.remove()
        optimizer.zero_grad(set_to_none=True)
        self._timed("dense backward", loss.backward)
        gradients = [
            parameter.grad for parameter in dense.parameters() if parameter.grad is not None
        ]
        self._timed("dense gradients", lambda: _average(gradients))

    def _send_gradients_back(self) -> None:
        trained = range(self._trained)

        def back() -> None:
            for number in trained:
                torch.autograd.backward(
                    _tensors(self._outputs[number]), _gradients(_tensors(self._used[number]))
                )

        def update() -> None:
            for number in trained:
                torch.autograd.backward(self._vectors[number], _gradients(self._sent[number]))

        self._timed("output gradients", back)
        self._timed("table update", update)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _leaves(output: Any) -> Any:
    if isinstance(output, KeyedTensor):
        return KeyedTensor(output.keys(), output.length_per_key(), _leaf(output.values()))
    return {k: JaggedTensor(_leaf(v.values()), lengths=v.lengths()) for k, v in output.items()}


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, KeyedTensor):
        return [output.values()]
    return [jagged.values() for jagged in output.values()]


def _gradients(values: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in values]


def _average(gradients: list[Tensor]) -> None:
    """Averages gradients over ranks in one all-reduce."""
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def replay(caught: list[Call], clock: Clock) -> dict[str, float]:
    """Seconds of the meta layers by themselves, on the inputs that they had."""
    spent = dict.fromkeys(META, 0.0)
    for module, args, kwargs in caught:
        args, kwargs = tree_map(
            lambda tensor: (
                tensor.detach().requires_grad_(tensor.requires_grad)
                if isinstance(tensor, torch.Tensor)
                else tensor
            ),
            (args, kwargs),
        )
        began = clock.start()
        result = module(*args, **kwargs)
        spent[META[0]] += clock.stop(began)[0]
        outputs = [
            tensor
            for tensor in tree_leaves(result)
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad
        ]
        inputs = [
            tensor
            for tensor in [*tree_leaves((args, kwargs)), *module.parameters()]
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad
        ]
        if outputs and inputs:
            gradients = [torch.ones_like(tensor) for tensor in outputs]
            began = clock.start()
            torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
            spent[META[1]] += clock.stop(began)[0]
    return spent


def pipelined(
    run: Run, feed: Iterator[Batch], held: list[Batch], steps: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of segments of `steps` steps as training runs them, the loader in and out in turn."""

    def segment(batches: Iterator[Batch]) -> float:
        dist.barrier()
        began = clock.start()
        for _ in range(steps):
            run.pipeline.progress(batches)
        return float(clock.stop(began)[0])

    segment(iter(held))  # the pipeline rewrites the model at its first batch
    rates: dict[str, list[float]] = {"loader in": [], "loader out": []}
    for _ in range(SEGMENTS):
        rates["loader in"].append(segment(itertools.islice(feed, steps)))
        rates["loader out"].append(segment(iter(held)))
    return rates


def write_trace(run: Run, batches: Iterator[Batch], path: Path) -> None:
    """Writes a Chrome trace of two pipelined steps on rank 0."""
    with profile() as profiler:
        for _ in range(2):
            run.pipeline.progress(batches)
    if run.runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
