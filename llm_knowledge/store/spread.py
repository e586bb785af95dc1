"""How far the vectors of a store lie apart: their mean, their mean cosine, their effective rank.

Hidden states of a decoder share one large direction: the cosine of two users is then near 1, and what
tells them apart is a few thousandths of the vectors. The mean over a store is that direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_knowledge.store.compress import blocks
from llm_knowledge.store.neighbours import unit_length
from llm_knowledge.store.reader import KnowledgeStore

ALIKE = 0.9  # mean cosine above which a store is called alike
SAMPLE_ROWS = 2_000  # whose effective rank is taken


@dataclass(frozen=True)
class Spread:
    """Of the vectors of a store.

    Attributes:
        mean_cosine: Of two different rows, over all pairs.
        effective_rank: Of a sample's centred vectors: exp of the entropy of their normalised singular
            values (Roy and Vetterli, 2007); as many directions of equal size would have it.
    """

    mean_cosine: float
    effective_rank: float

    @property
    def is_alike(self) -> bool:
        """Whether rows can hardly be told apart before they are centred."""
        return self.mean_cosine > ALIKE


def mean_vector(store: KnowledgeStore) -> np.ndarray:
    """Mean over the rows of a store, float32 [dim]; 0 for a store without rows."""
    total = np.zeros(store.manifest.dim, np.float64)
    for block in blocks(store):
        total += block.sum(axis=0, dtype=np.float64)
    return (total / max(len(store), 1)).astype(np.float32)


def spread_of(store: KnowledgeStore) -> Spread | None:
    """Measures a store in one pass; None for fewer than two rows."""
    rows = len(store)
    if rows < 2:
        return None
    total = np.zeros(store.manifest.dim, np.float64)
    lengths = 0.0  # of unit vectors: the number of rows that are not 0
    sample = []
    step = -(-rows // SAMPLE_ROWS)
    first = 0
    for block in blocks(store):
        units = unit_length(block)
        total += units.sum(axis=0, dtype=np.float64)
        lengths += float(np.square(units, dtype=np.float64).sum())
        sample.append(units[-first % step :: step])
        first += len(block)
    cosine = (float(total @ total) - lengths) / (rows * (rows - 1))
    return Spread(cosine, _effective_rank(np.concatenate(sample)))


def _effective_rank(vectors: np.ndarray) -> float:
    """Of vectors [n, dim], their mean taken away; 0 where they are all the same."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    sizes = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    shares = sizes[sizes > 1e-6 * max(float(sizes[-1]), 1e-12)] / max(float(sizes.sum()), 1e-12)
    return (
        float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) and sizes[-1] > 1e-6 else 0.0
    )
