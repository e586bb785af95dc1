"""Sequences in the model: the steps' vectors become one vector of a sample, by the target or without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from embeddings.tables import Table
from trainer.features.encoder import FeatureEncoder
from trainer.features.resolve import DEFAULT_DIM, Feature
from trainer.features.steps import GAP, GAP_ROWS, ITEM

HIDDEN = 36  # of the attention's MLP, as in the paper


@dataclass(frozen=True)
class FieldShape:
    """A field of a sequence.

    Attributes:
        key: Of its steps in a batch.
        width: Of a step's vector.
        target: Key of the target's own id in a batch; "": a gap has none.
        optional: Whether a step may have no value.
    """

    key: str
    width: int
    target: str = ""
    optional: bool = False


@dataclass(frozen=True)
class SequenceShape:
    """One sequence as the model sees it.

    Attributes:
        name: Its name.
        pooling: attention, sum or mean.
        block: Block of the bottom input that it enters.
        fields: Its fields, in order.
        steps: Mean number of steps of a sample.
    """

    name: str
    pooling: str
    block: str
    fields: tuple[FieldShape, ...]
    steps: float = 1.0

    @property
    def table_name(self) -> str:
        """Name of its projection."""
        return f"sequence_{self.name}"

    @property
    def width(self) -> int:
        """Width of the pooled vector: attention weighs by gaps, the other ways add their vectors too."""
        return sum(field.width for field in self.pooled_fields)

    @property
    def pooled_fields(self) -> tuple[FieldShape, ...]:
        """Fields whose vectors are pooled."""
        of_targets = tuple(field for field in self.fields if field.target)
        return of_targets if self.pooling == "attention" else self.fields

    def keys_that_read(self, target: str) -> tuple[str, ...]:
        """Keys of its steps that read the same table as the target's key."""
        return tuple(field.key for field in self.fields if field.target == target)

    def gap_table(self) -> list[Table]:
        """The table of its gaps, where it has some."""
        return [
            Table(
                f"gap_{self.name}",
                GAP_ROWS,
                field.width,
                (field.key,),
                sequence=True,
                ids_per_sample=(max(self.steps, 1e-3),),
            )
            for field in self.fields
            if not field.target
        ]


def sequence_shapes(
    features: Sequence[Feature], encoder: FeatureEncoder, item_width: int, block: str
) -> tuple[SequenceShape, ...]:
    """What the model needs to know of the sequences of a run, in the encoder's order.

    Args:
        features: All features of the run; a field that is one has its width.
        encoder: Knows how long sequences are.
        item_width: Width of the item table.
        block: Where a sequence goes that goes into no other block.
    """
    widths = {feature.name: feature.width for feature in features if not feature.is_sequence}
    lengths = {encoding.name: encoding.ids_per_sample for encoding in encoder.encodings}

    def shape(field: str, key: str, feature: Feature) -> FieldShape:
        if field == ITEM:
            return FieldShape(key, item_width, "item")
        if field == GAP:
            return FieldShape(key, feature.use.dim or DEFAULT_DIM)
        return FieldShape(key, widths[field], f"feature_{field}", optional=True)

    return tuple(
        SequenceShape(
            feature.name,
            feature.use.pooling or "attention",
            feature.use.into or block,
            tuple(map(shape, feature.fields, feature.columns, [feature] * len(feature.fields))),
            lengths[feature.name],
        )
        for feature in features
        if feature.is_sequence
    )


class SequencePooling(nn.Module):
    """Pools the steps of a sequence.

    `sum` and `mean` of the steps' vectors; or `attention` (Deep Interest Network, Zhou et al., KDD 2018, eq.
    3): the sum of a(q, k) k, where k are a step's vectors and q the target's, from the same tables. a is an
    MLP on [q, k, q - k, q * k] and the vector of the gap, and is not normalised, as in the paper.

    Args:
        shape: The sequence.
    """

    def __init__(self, shape: SequenceShape) -> None:
        super().__init__()
        self.shape = shape
        self.weigh: nn.Module | None = None
        if shape.pooling == "attention":
            gaps = sum(field.width for field in shape.fields if not field.target)
            self.weigh = nn.Sequential(
                nn.Linear(4 * shape.width + gaps, HIDDEN), nn.PReLU(), nn.Linear(HIDDEN, 1)
            )

    def forward(self, vectors: Mapping[str, JaggedTensor], present: Mapping[str, Tensor]) -> Tensor:
        """Pools steps that lie one after the other, without padding.

        Args:
            vectors: Key of a batch to the vectors of its ids: of the steps, and of the targets.
            present: Key of an optional field to 1 where a step has a value, else 0, float32 [steps].

        Returns:
            [B, width].
        """
        fields, lengths = self.shape.fields, vectors[self.shape.fields[0].key].lengths()
        steps = {field.key: vectors[field.key].values() for field in fields}
        steps |= {
            field.key: steps[field.key] * present[field.key][:, None]
            for field in fields
            if field.optional
        }
        keys = torch.cat([steps[field.key] for field in self.shape.pooled_fields], dim=1)
        if self.weigh is not None:
            targets = [field for field in fields if field.target]
            query = torch.cat([target_vectors(vectors, field.target) for field in targets], dim=1)
            query = torch.repeat_interleave(query, lengths, dim=0, output_size=len(keys))
            gaps = [steps[field.key] for field in fields if not field.target]
            pairs = torch.cat([query, keys, query - keys, query * keys, *gaps], dim=1)
            keys = self.weigh(pairs) * keys
        pooled = torch.segment_reduce(keys.float(), "sum", lengths=lengths, unsafe=True, initial=0)
        if self.shape.pooling == "mean":
            pooled = pooled / lengths.clamp(min=1)[:, None]
        return pooled


def target_vectors(vectors: Mapping[str, JaggedTensor], key: str) -> Tensor:
    """Vectors of a key with one id or none per sample, 0 without one, [B, width]."""
    return vectors[key].to_padded_dense(1).squeeze(1)
