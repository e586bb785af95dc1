"""What goes into the model's sizes, and what a step leaves behind."""

from dataclasses import dataclass

from torch import Tensor

from trainer.features.block import FeatureShape
from trainer.features.pooling import SequenceShape


@dataclass(frozen=True)
class Shapes:
    """What the data says about the model's size.

    Attributes:
        user_rows: Rows of the user table.
        item_rows: Rows of the item table.
        history_length: Longest history of a sample; 0: the model reads none.
        scenarios: Number of scenarios.
        user_vectors: (rows, dim) of the user store, or None.
        item_vectors: (rows, dim) of the item store, or None.
        scenario_vectors: The scenario store itself, standardised, float32 [rows, dim], or None; of
            several dates one after the other.
        scenario_stores: Which of the stores by date a row of it is of, int64 [rows], or None.
        label_weights: Weight in the loss of each further label; the first label's is 1.
        features: What is read besides.
        sequences: Sequences that are read besides.
        features_width: Width of the block that features enter.
    """

    user_rows: int
    item_rows: int
    history_length: int
    scenarios: int
    user_vectors: tuple[int, int] | None = None
    item_vectors: tuple[int, int] | None = None
    scenario_vectors: Tensor | None = None
    scenario_stores: Tensor | None = None
    label_weights: tuple[float, ...] = ()
    features: tuple[FeatureShape, ...] = ()
    sequences: tuple[SequenceShape, ...] = ()
    features_width: int = 0

    @property
    def tasks(self) -> int:
        """Logits per sample."""
        return 1 + len(self.label_weights)


@dataclass
class Predictions:
    """What a step leaves behind, [B]: logits, labels, weights (0 = padding), scenarios, join.

    `extra_logits` [B, E] are those of the further labels.
    """

    logits: Tensor
    label: Tensor
    weight: Tensor
    scenario: Tensor
    has_knowledge: Tensor
    extra_logits: Tensor
