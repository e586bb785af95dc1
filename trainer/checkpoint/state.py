"""The trainable state as flat tensors, and its way back from a checkpoint into any sharding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torchrec.distributed.types import ShardedTensor

from llm_knowledge.errors import InputError
from trainer.checkpoint.reader import CheckpointReader
from trainer.models.llm4msr import KNOWLEDGE_PREFIX

if TYPE_CHECKING:  # which imports this module
    from trainer.run.session import Run

MODEL_PREFIX = "model."
ACCUMULATOR_PREFIX = "table_optimizer."
DENSE_OPTIMIZER_PREFIX = "dense_optimizer."


def live_state(run: Run) -> dict[str, Any]:
    """Flat name to tensor; the tensors alias the live ones, so loading into them is enough.

    Flat, because a nested dict fails on ranks that own no part of a table.
    """
    state = {
        f"{MODEL_PREFIX}{name}": value
        for name, value in run.model.state_dict().items()
        if not name.startswith(KNOWLEDGE_PREFIX)
    }
    for name, values in run.model.fused_optimizer.state_dict()["state"].items():
        if not name.startswith(KNOWLEDGE_PREFIX):
            state |= {f"{ACCUMULATOR_PREFIX}{name}.{key}": value for key, value in values.items()}
    names = {id(parameter): name for name, parameter in run.model.module.dense.named_parameters()}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            moments = run.optimizer.state[parameter]
            if not moments:
                # Adam makes its state at the first step; a fresh process has none to fill. Fused, it
                # wants its step count where the parameter is.
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            for key, value in moments.items():
                state[f"{DENSE_OPTIMIZER_PREFIX}{names[id(parameter)]}.{key}"] = value
    return state


def load_state(checkpoint: Path, run: Run) -> None:
    """Restores everything in place: what is there and what is needed must be the same, sizes included.

    Raises:
        InputError: If the checkpoint is damaged or belongs to another model.
    """
    live, saved = live_state(run), saved_tensors(checkpoint)
    if missing := sorted(live.keys() - saved.keys()):
        raise InputError(
            f"{checkpoint}: holds nothing for {missing[0]} and {len(missing) - 1} more; it belongs to "
            "another model"
        )
    if surplus := sorted(saved.keys() - names_on_all_ranks(live)):
        raise InputError(
            f"{checkpoint}: holds {surplus[0]} and {len(surplus) - 1} more that the model has not; it "
            "belongs to another model"
        )
    same, routed = {}, []
    for name, value in live.items():
        if saved[name].size == value.size():
            same[name] = value
        elif name.startswith(ACCUMULATOR_PREFIX) and len(saved[name].size) == value.dim() == 1:
            routed += list(routes(name, live, saved, None))
        else:
            raise InputError(
                f"{checkpoint}: {name} is {tuple(saved[name].size)}, the model needs "
                f"{tuple(value.size())}"
            )
    with reading(checkpoint):
        dcp.load(same, storage_reader=CheckpointReader(checkpoint))
    follow(checkpoint, routed)


def names_on_all_ranks(state: dict[str, Any]) -> set[str]:
    """Names of the state of the whole job: a rank without a part of a table may not name it."""
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(state))
    return {name for part in names for name in part}


def saved_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Name to size and pieces of every tensor in a checkpoint.

    Raises:
        InputError: If its metadata is missing or damaged.
    """
    with reading(checkpoint):
        entries = CheckpointReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Makes an `InputError` of whatever reading a damaged checkpoint raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (Exception, CheckpointException) as error:
            words = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(
                f"{checkpoint}: the checkpoint is damaged ({words[0]}); remove it to go on from an "
                "older one"
            ) from error


@dataclass
class Route:
    """Rows of this rank that come from rows of a checkpoint.

    Attributes:
        target: This rank's rows: [n, width] of a table, [n] of one accumulator per row.
        known: bool [n], rows that the checkpoint has; the others are left as they are.
        source: int64, where each known row lies in the buffers.
        parts: (name in the checkpoint, offsets there, buffer, weight): the value is the weighted sum.
    """

    target: Tensor
    known: Tensor
    source: Tensor
    parts: list[tuple[str, tuple[int, ...], Tensor, float]]


def routes(
    name: str,
    live: dict[str, Any],
    saved: dict[str, TensorStorageMetadata],
    old_rows: Tensor | None,
    source: str | None = None,
) -> Iterator[Route]:
    """Plans how a table, or its optimizer state, gets its rows from a checkpoint.

    A state with one value per row has n of them per row if the table is cut into n ranges of columns:
    the k-th, of rows k * rows to (k + 1) * rows, is the mean square of the gradient's k-th part. So a
    range gets the mean over what covered it before, by width: exact if columns are put together, and
    the best guess if they are cut up.

    Args:
        name: A name of the state; tables and accumulators only.
        live: The state.
        saved: What the checkpoint holds.
        old_rows: int64 [rows], a row of the checkpoint for every row, or -1; None: the same row.
        source: Its name in the checkpoint; None: the same name.
    """
    source = source or name
    table, table_before = table_of(name), table_of(source)
    rows, rows_before = live[table].size()[0], saved[table_before].size[0]
    if old_rows is None:
        old_rows = torch.arange(rows)
    for tensor, offsets in local_parts(live[name]):
        if tensor.dim() == 2:
            rows_read = old_rows[offsets[0] : offsets[0] + len(tensor)]
            yield from _route(tensor, rows_read, [(source, 0, offsets[1], 1.0)])
            continue
        now = _column_ranges(live[table])
        before = _chunk_ranges(saved[table_before])
        for column in range(offsets[0] // rows, (offsets[0] + len(tensor) - 1) // rows + 1):
            first = max(column * rows, offsets[0])
            last = min((column + 1) * rows, offsets[0] + len(tensor))
            rows_read = old_rows[first - column * rows : last - column * rows]
            sources: list[_Source] = [
                (source, number * rows_before, None, share)
                for number, share in _shares(now[column], before)
            ]
            yield from _route(tensor[first - offsets[0] : last - offsets[0]], rows_read, sources)


def table_of(name: str) -> str:
    """Name of the table whose accumulator, or which itself, has a name."""
    if not name.startswith(ACCUMULATOR_PREFIX):
        return name
    return MODEL_PREFIX + name.removeprefix(ACCUMULATOR_PREFIX).rsplit(".", 2)[0]


_Source = tuple[str, int, int | None, float]  # name, first row, first column of a table, share


def _route(target: Tensor, rows_read: Tensor, sources: list[_Source]) -> Iterator[Route]:
    known = rows_read >= 0
    if not known.any():
        return
    low, high = int(rows_read[known].min()), int(rows_read[known].max()) + 1
    parts: list[tuple[str, tuple[int, ...], Tensor, float]] = []
    for name, row, column, share in sources:
        offset = (row + low,) if column is None else (row + low, column)
        buffer = torch.empty((high - low, *target.shape[1:]), dtype=target.dtype)
        parts.append((name, offset, buffer, share))
    yield Route(target, known, rows_read[known] - low, parts)


def local_parts(value: Tensor | ShardedTensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """This rank's parts of a tensor with their offsets; data-parallel ones are whole."""
    if isinstance(value, ShardedTensor):
        return [
            (
                shard.tensor.detach().view(shard.metadata.shard_sizes),
                tuple(shard.metadata.shard_offsets),
            )
            for shard in value.local_shards()
            if shard.tensor.numel()
        ]
    return [(value.detach(), (0,) * value.dim())]


def _column_ranges(table: Tensor | ShardedTensor) -> list[tuple[int, int]]:
    """(first column, width) of the ranges that a table is cut into."""
    if not isinstance(table, ShardedTensor):
        return [(0, table.shape[1])]
    pieces = table.metadata().shards_metadata
    return sorted({(piece.shard_offsets[1], piece.shard_sizes[1]) for piece in pieces})


def _chunk_ranges(table: TensorStorageMetadata) -> list[tuple[int, int]]:
    return sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in table.chunks})


def _shares(target: tuple[int, int], before: list[tuple[int, int]]) -> list[tuple[int, float]]:
    """(number, share) of the ranges of columns that overlap with the wanted one."""
    start, width = target
    overlaps = [min(start + width, b + w) - max(start, b) for b, w in before]
    return [(number, size / width) for number, size in enumerate(overlaps) if size > 0]


class _Pieces(DefaultLoadPlanner):
    """Reads ranges of saved tensors into plain buffers; not collective."""

    def __init__(self, pieces: list[tuple[str, tuple[int, ...], Tensor]]) -> None:
        super().__init__()
        self._pieces = pieces

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for number, (name, offsets, buffer) in enumerate(self._pieces):
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunk = ChunkStorageMetadata(torch.Size(offsets), buffer.size())
            read_items = create_read_items_for_chunk_list(name, entry, [chunk])
            items += [replace(item, dest_index=MetadataIndex(str(number))) for item in read_items]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._pieces[int(index.fqn)][2]


def follow(checkpoint: Path, planned: list[Route]) -> None:
    """Reads what the routes need and fills their rows; each rank by itself.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    pieces = [
        (name, offset, buffer) for route in planned for name, offset, buffer, _ in route.parts
    ]
    if not pieces:
        return
    with reading(checkpoint):
        dcp.load(
            {},
            storage_reader=CheckpointReader(checkpoint),
            planner=_Pieces(pieces),
            no_dist=True,
        )
    for route in planned:
        value = sum(weight * buffer[route.source] for _, _, buffer, weight in route.parts)
        assert isinstance(value, Tensor)
        route.target[route.known.to(route.target.device)] = value.to(route.target.device)
