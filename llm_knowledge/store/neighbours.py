"""The rows of a store that are nearest by cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_knowledge.store.reader import KnowledgeStore

BLOCK_ROWS = 4_096


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., dim] divided by their lengths, float32; a zero vector stays zero."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def nearest(
    store: KnowledgeStore, rows: Sequence[int], count: int = 5, scanned: int | None = None
) -> list[list[tuple[int, float]]]:
    """For each of some rows, the other rows that are most similar to it.

    Vectors are read block by block, once for all rows, so a store of any size can be searched.

    Args:
        store: the store.
        rows: row numbers of the vectors to compare with.
        count: number of neighbours.
        scanned: only so many first rows of the store are looked at; None: all.

    Returns:
        For each of `rows`, (row, cosine) of its neighbours, best first; of equals the first row.
    """
    if not len(rows):
        return []
    queries = unit_length(np.concatenate([store.read_vectors(row, row + 1) for row in rows]))
    best: list[list[tuple[int, float]]] = [[] for _ in rows]
    stop = min(len(store), len(store) if scanned is None else scanned)
    for start in range(0, stop, BLOCK_ROWS):
        block = unit_length(store.read_vectors(start, min(start + BLOCK_ROWS, stop)))
        for number, cosine in enumerate(queries @ block.T):
            top = np.argsort(-cosine, kind="stable")[: count + 1].tolist()
            near = [(start + row, float(cosine[row])) for row in top if start + row != rows[number]]
            best[number] = sorted(best[number] + near, key=lambda pair: -pair[1])[:count]
    return best
