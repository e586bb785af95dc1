"""The phases of a sharded lookup: each with its result awaited, its time taken, its bytes counted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embeddings.profiling.measure import Clock
from embeddings.tables import Table

PHASES = ("input distribution", "lookup", "output distribution", "backward with update")
Timing = tuple[float, float]  # seconds passed, seconds on processors


@dataclass
class Subject:
    """One sharded collection and what it is fed.

    Attributes:
        name: Of the collection.
        tables: Its tables.
        module: torchrec's sharded collection.
        batches: Ids of this rank, one per batch; taken in turn.
        rule: Name of the update rule; None for frozen tables, which have no backward.
        learning_rate: Step size of the rule.
        update: Called after a backward where that does not update by itself (data-parallel tables).
    """

    name: str
    tables: list[Table]
    module: Any
    batches: list[KeyedJaggedTensor]
    rule: str | None
    learning_rate: float
    update: Callable[[], object] = lambda: None
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Positive, so that sums over a row cannot cancel and a rule's signs are certain.
        generator = torch.Generator().manual_seed(7 + dist.get_rank())
        for ids in self.batches:
            shapes = {"": (ids.stride(), sum(t.dim * len(t.features) for t in self.tables))}
            if self.sequence:
                shapes = {
                    feature: (ids[feature].values().numel(), table.dim)
                    for table in self.tables
                    for feature in table.features
                }
            self.gradients.append(
                {
                    name: (torch.rand(shape, generator=generator) + 0.5).to(ids.device())
                    for name, shape in shapes.items()
                }
            )

    @property
    def sequence(self) -> bool:
        """Whether every id has a vector of its own in the output."""
        return self.tables[0].sequence

    def fresh(self, step: int) -> KeyedJaggedTensor:
        """A batch without what an earlier use has computed and kept in it."""
        ids = self.batches[step % len(self.batches)]
        return KeyedJaggedTensor(
            ids.keys(), ids.values(), lengths=ids.lengths(), weights=ids.weights_or_none()
        )

    def gradient(self, step: int) -> dict[str, Tensor]:
        """The gradient of a batch's outputs."""
        return self.gradients[step % len(self.gradients)]

    def context(self) -> AbstractContextManager[object]:
        """What the model calls the collection under."""
        return torch.no_grad() if self.rule is None else nullcontext()


def outputs(output: KeyedTensor | dict[str, JaggedTensor]) -> dict[str, Tensor]:
    """Values by feature; those of pooled features are one tensor, under ""."""
    if isinstance(output, KeyedTensor):
        return {"": output.values()}
    return {name: jagged.values() for name, jagged in output.items()}


def backward(values: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """Sends gradients into outputs."""
    torch.autograd.backward(list(values.values()), [gradients[name] for name in values])


def run_step(subject: Subject, step: int, clock: Clock) -> dict[str, Timing]:
    """One whole step, as training does it: "forward", and "step" with backward and update."""
    ids, gradient = subject.fresh(step), subject.gradient(step)
    began = clock.start()
    with subject.context():
        values = outputs(subject.module(ids).wait())
    forward = clock.stop(began)
    if subject.rule is not None:
        backward(values, gradient)
        subject.update()
    return {"forward": forward, "step": clock.stop(began)}


def run_phases(
    subject: Subject,
    step: int,
    clock: Clock,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Timing]:
    """One step in separate phases; every rank enters a phase when all have left the one before."""
    module, ids, gradient = subject.module, subject.fresh(step), subject.gradient(step)
    timings: dict[str, Timing] = {}
    state: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        dist.barrier()
        with around(name):
            began = clock.start()
            result = call()
            timings[name] = clock.stop(began)
        return result

    def distribute() -> Any:
        state["context"] = module.create_context()
        return module.input_dist(state["context"], ids).wait().wait()

    def update() -> None:
        backward(values, gradient)
        subject.update()

    with subject.context():
        rows = timed(PHASES[0], distribute)
        vectors = timed(PHASES[1], lambda: module.compute(state["context"], rows))
        values = timed(
            PHASES[2], lambda: outputs(module.output_dist(state["context"], vectors).wait())
        )
    if subject.rule is not None:
        timed(PHASES[3], update)
    return timings


class LinkBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to others in collectives, each by its least traffic."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Counts, then calls."""
        name = str(func.name())
        if name.startswith("c10d::"):
            self.sent += _sent(name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...]) -> int:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    others = ranks - 1
    if name == "alltoall_base_":
        size, splits = args[1].nbytes, list(args[4])
        kept = splits[rank] / max(sum(splits), 1) if splits else 1 / ranks
        return round(size * (1 - kept))
    if name == "alltoall_":
        return sum(part.nbytes for other, part in enumerate(args[1]) if other != rank)
    if name == "_reduce_scatter_base_":
        return int(args[1].nbytes * others // ranks)
    if name == "reduce_scatter_":
        return sum(
            part.nbytes for parts in args[1] for other, part in enumerate(parts) if other != rank
        )
    if name == "_allgather_base_":
        return int(args[1].nbytes * others)
    if name == "allgather_":
        return sum(part.nbytes for part in args[1]) * others
    if name == "allreduce_":
        return sum(2 * part.nbytes * others // ranks for part in args[0])
    return 0


def count_link_bytes(subject: Subject, step: int, clock: Clock) -> dict[str, int]:
    """Bytes that this rank sends to others, by phase; not to be timed."""
    sent: dict[str, int] = {}

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        with LinkBytes() as counter:
            yield
        sent[name] = counter.sent

    run_phases(subject, step, clock, counting)
    return sent


def count_memory_bytes(subject: Subject, step: int) -> dict[str, int]:
    """Least bytes that this rank's memory must move, by phase, from the tensors of one batch.

    Input distribution: ids and lengths, read once here and written once where they go. Lookup: ids,
    lengths, a row per id, the vectors written. Output distribution: vectors read, outputs written.
    Backward: the gradient read and handed on, the ids, and each distinct row with its optimizer state
    read and written once (data-parallel tables: all rows, and their gradient).
    """
    module, ids = subject.module, subject.fresh(step)
    with torch.no_grad():
        context = module.create_context()
        rows = module.input_dist(context, ids).wait().wait()
        vectors = module.compute(context, rows)
        values = outputs(module.output_dist(context, vectors).wait())
    received = sum(part.values().nbytes + part.lengths().nbytes for part in rows)
    produced = sum(vector.nbytes for vector in vectors)
    delivered = sum(value.nbytes for value in values.values())
    read = updated = 0
    for lookup, features in zip(module._lookups, rows, strict=True):
        one_read, one_updated = _row_bytes(lookup, features, subject.rule)
        read, updated = read + one_read, updated + one_updated
    given = ids.values().nbytes + ids.lengths().nbytes
    # What is handed on as it is, is not moved: a single rank's ids and vectors.
    moved_in = any(part.values().data_ptr() != ids.values().data_ptr() for part in rows)
    storages = {vector.data_ptr() for vector in vectors}
    moved_out = any(value.data_ptr() not in storages for value in values.values())
    counts = {
        PHASES[0]: (given + received) * moved_in,
        PHASES[1]: received + read + produced,
        PHASES[2]: (produced + delivered) * moved_out,
    }
    if subject.rule is not None:
        counts[PHASES[3]] = delivered + produced * moved_out + received + updated
    return counts


STATE_BYTES = {  # of an update rule: bytes per value, and per row
    "sgd": (0, 0),
    "adagrad": (4, 0),
    "rowwise_adagrad": (0, 4),
    "adam": (8, 0),
    "partial_rowwise_adam": (4, 4),
    "lamb": (8, 0),
}


def _row_bytes(lookup: nn.Module, features: KeyedJaggedTensor, rule: str | None) -> tuple[int, int]:
    """Bytes of the rows that one lookup reads, and of those that its update reads and writes."""
    inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
    per_value, per_row = STATE_BYTES.get(rule or "sgd", (0, 0))
    counts, feature, first = features.length_per_key(), 0, 0
    read = updated = 0
    for group in inner.grouped_configs:  # type: ignore[union-attr]
        for table in group.embedding_tables:
            of_table = sum(counts[feature : feature + table.num_features()])
            chosen = features.values()[first : first + of_table]
            feature, first = feature + table.num_features(), first + of_table
            size = 2 if table.data_type.name == "FP16" else 4
            read += of_table * table.local_cols * size
            row = table.local_cols * (size + per_value) + per_row
            if group.compute_kernel.value == "dense":  # all rows, and their gradient
                updated += 2 * table.local_rows * (row + table.local_cols * size)
            else:
                updated += 2 * chosen.unique().numel() * row
    return read, updated
