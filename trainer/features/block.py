"""The model's side of features: their tables, and the projections that bring them into the bottom input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embeddings.tables import Table
from trainer.features.encoder import FeatureEncoder
from trainer.features.pooling import SequencePooling, SequenceShape, target_vectors
from trainer.features.resolve import Feature

BLOCK = "features"  # where a feature goes that goes into no other block


@dataclass(frozen=True)
class FeatureShape:
    """One feature as the model sees it.

    Attributes:
        name: Its name.
        width: Of what is read of a sample.
        block: Block of the bottom input that it enters: user, item, scenario or features.
        rows: Rows of its table; 0: a number.
        ids_per_sample: Mean number of ids of a sample.
        weighted: Whether its ids have weights.
        mean: Whether the sum over a sample's ids is divided by their number.
        steps: Keys of sequences' steps that read its table too, with their mean number in a sample: the
            table then gives a vector per id.
    """

    name: str
    width: int
    block: str
    rows: int = 0
    ids_per_sample: float = 1.0
    weighted: bool = False
    mean: bool = False
    steps: tuple[tuple[str, float], ...] = ()

    @property
    def table_name(self) -> str:
        """Name of its table, and of its ids in a batch."""
        return f"feature_{self.name}"

    def table(self) -> Table:
        """Its table."""
        return Table(
            self.table_name,
            self.rows,
            self.width,
            (self.table_name, *(key for key, _ in self.steps)),
            # The planner wants more than no ids.
            ids_per_sample=(self.ids_per_sample, *(max(count, 1e-3) for _, count in self.steps)),
            sequence=bool(self.steps),
            weighted=self.weighted,
        )


def feature_shapes(
    features: Sequence[Feature], encoder: FeatureEncoder
) -> tuple[FeatureShape, ...]:
    """What the model needs to know of the features of a run but its sequences, in the encoder's order."""
    encodings = {encoding.name: encoding for encoding in encoder.encodings}

    def steps(name: str) -> tuple[tuple[str, float], ...]:
        return tuple(
            (column, sequence.ids_per_sample)
            for sequence in encoder.sequences
            for field, column in zip(sequence.fields, sequence.columns, strict=True)
            if field == name
        )

    return tuple(
        FeatureShape(
            feature.name,
            feature.width,
            feature.use.into or BLOCK,
            encodings[feature.name].rows,
            encodings[feature.name].ids_per_sample,
            weighted=feature.weights is not None,
            mean=feature.use.pooling == "mean" and feature.weights is None,
            steps=steps(feature.name),
        )
        for feature in features
        if not feature.is_sequence
    )


def block_width(features: Sequence[FeatureShape | SequenceShape], width: int) -> int:
    """Width of the block `features`: 0 where no feature goes into it."""
    return width if any(feature.block == BLOCK for feature in features) else 0


class FeatureBlocks(nn.Module):
    """Sum over the features of a block of P_f e_f: one projection per feature, one product per block.

    A projection starts with weights that are uniform to 1 / sqrt(width of all features of the block).

    Args:
        features: What is read; numbers in the order of `Batch.numbers`.
        dim: Width of the blocks user, item and scenario.
        width: Width of the block features.
        sequences: Sequences that are read, each pooled by a module of its own.
    """

    def __init__(
        self,
        features: Sequence[FeatureShape],
        dim: int,
        width: int,
        sequences: Sequence[SequenceShape] = (),
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.poolings = nn.ModuleDict(
            {sequence.table_name: SequencePooling(sequence) for sequence in sequences}
        )
        self.optional = [
            field.key for sequence in sequences for field in sequence.fields if field.optional
        ]
        self.blocks: dict[str, list[FeatureShape | SequenceShape]] = {}
        read: list[FeatureShape | SequenceShape] = [*features, *sequences]
        for feature in read:
            self.blocks.setdefault(feature.block, []).append(feature)
        self.projections = nn.ParameterDict()
        for block, members in self.blocks.items():
            out = width if block == BLOCK else dim
            bound = 1 / math.sqrt(sum(feature.width for feature in members))
            for feature in members:
                weight = torch.empty(out, feature.width).uniform_(-bound, bound)
                self.projections[feature.table_name] = nn.Parameter(weight)

    def forward(
        self,
        pooled: KeyedTensor,
        weighted: KeyedTensor | None,
        ids: KeyedJaggedTensor,
        numbers: Tensor,
        steps: Mapping[str, JaggedTensor] | None = None,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Projects what was looked up.

        Args:
            pooled: Sums of vectors by table, [B, width] each.
            weighted: Weighted sums likewise, of the features whose ids have weights.
            ids: Of the batch, whose lengths divide means.
            numbers: float32 [B, 2 * numbers].
            steps: Vectors per id of the tables that sequences read, by key.
            present: Whether the steps of fields that may be missing are there, one field after the other,
                float32 [sum of steps].

        Returns:
            Block to [B, width of it].
        """
        vectors: dict[str, Tensor] = {}
        column = 0
        for feature in self.features:
            name = feature.table_name
            if not feature.rows:
                vectors[name] = numbers[:, column : column + feature.width]
                column += feature.width
                continue
            if feature.steps:
                assert steps is not None
                vectors[name] = target_vectors(steps, name)
                continue
            source = weighted if feature.weighted and weighted is not None else pooled
            vectors[name] = source[name]
            if feature.mean:
                vectors[name] = vectors[name] / ids[name].lengths().clamp(min=1)[:, None]
        if self.poolings:
            assert steps is not None and present is not None  # noqa: PT018
            lengths = [len(steps[key].values()) for key in self.optional]
            there = dict(zip(self.optional, present.split(lengths), strict=True))
            vectors |= {name: pool(steps, there) for name, pool in self.poolings.items()}
        made = {}
        for block, members in self.blocks.items():
            names = [feature.table_name for feature in members]
            made[block] = F.linear(
                torch.cat([vectors[name] for name in names], dim=1),
                torch.cat([self.projections[name] for name in names], dim=1),
            )
        return made
