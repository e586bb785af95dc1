"""Arithmetic on vectors of texts that are computed already."""

from __future__ import annotations

import numpy as np


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, D] scaled to length 1; a vector of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def join_parts(vectors: np.ndarray, parts: np.ndarray, normalize: bool) -> np.ndarray:
    """Means of the vectors of texts' parts, `parts` of them to a text.

    Args:
        vectors: float32 [sum of parts, D], a text's parts side by side. Where vectors are to have
            length 1 they have it, and so count alike.
        parts: of each text, int64 [N], at least 1.
        normalize: Whether the means get length 1.

    Returns:
        float32 [N, D].
    """
    if len(vectors) == len(parts):
        return vectors
    means = np.add.reduceat(vectors, np.cumsum(parts) - parts) / parts[:, None]
    return (unit_length(means) if normalize else means).astype(np.float32)
