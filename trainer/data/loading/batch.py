"""One batch as the model sees it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings.zero_collision.row_reset import ReassignedRows


def no_ids() -> KeyedJaggedTensor:
    """Ids of no feature."""
    nothing = torch.empty(0, dtype=torch.int64)
    return KeyedJaggedTensor([], nothing, lengths=nothing, length_per_key=[])


@dataclass
class Batch(Pipelineable):
    """B samples; the last batch of a split is padded with rows of weight 0 that own no ids.

    Attributes:
        ids: Table rows of the features user, item (one each) and history (up to H), B samples; keys, before
            `Run.remap_ids` gave them rows, where `tables.ids` is zero_collision.
        knowledge: Store rows of the features user and item, empty where the join found nothing.
        scenario: Position of the scenario in the dataset's list, int64 [B].
        scenario_knowledge: Row of the scenario's vector, -1 without one, int64 [B].
        label: 0 or 1, float32 [B].
        weight: 1 for a sample, 0 for padding, float32 [B].
        extra_labels: Further labels, 0 or 1, float32 [B, E].
        numbers: Number features, each with 1 behind it where it is missing, float32 [B, 2 N].
        present: Of the steps of sequences that may have no value, 1 where they have one, else 0, one field
            after the other, float32.
        weighted: Table rows of the features whose ids have weights.
        fresh: Rows that were given to new ids for this batch, to be cleaned before its lookup.
    """

    ids: KeyedJaggedTensor
    knowledge: KeyedJaggedTensor
    scenario: Tensor
    scenario_knowledge: Tensor
    label: Tensor
    weight: Tensor
    extra_labels: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    present: Tensor = field(default_factory=lambda: torch.empty(0))
    weighted: KeyedJaggedTensor = field(default_factory=no_ids)
    fresh: ReassignedRows = field(default_factory=ReassignedRows)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Copies to a device."""
        return Batch(
            *(part.to(device=device, non_blocking=non_blocking) for part in vars(self).values())
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps memory alive while `stream` uses it."""
        for part in vars(self).values():
            part.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Copies to page-locked host memory."""
        return Batch(*(part.pin_memory() for part in vars(self).values()))
