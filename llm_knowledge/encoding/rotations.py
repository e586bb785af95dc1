"""Rotary positions whose frequencies depend on the longest text of a batch.

LongRoPE (Ding et al., 2024, arXiv:2402.13753; Phi-3) has one set of frequencies up to the length of
its pretraining and another above it. Dynamic NTK scaling has frequencies of its own for every length
above. transformers chooses for the whole batch, by its longest text: texts on either side must not
share one, or a short text's vector depends on what it is read with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LengthRule:
    """Which texts have the same frequencies, by their tokens.

    Attributes:
        steps: lengths above which other frequencies hold, ascending.
        grows_from: the length above which every length has frequencies of its own, or None.
    """

    steps: tuple[int, ...] = ()
    grows_from: int | None = None

    @property
    def first(self) -> int | None:
        """The longest text that is read with the frequencies of all shorter ones; None: any."""
        return min(
            (*self.steps, *([] if self.grows_from is None else [self.grows_from])), default=None
        )

    def is_short(self, tokens: int) -> bool:
        """Whether a text has the frequencies of a beginning of it, so that it may share a prefix."""
        return self.first is None or tokens <= self.first

    def group(self, tokens: int, answer_tokens: int = 0) -> tuple[int, int]:
        """What is equal for texts that may be in one batch.

        Args:
            tokens: length of the text.
            answer_tokens: most tokens of its answer; all but the last are read, too. A text that comes
                to other frequencies on the way shares a batch with its equals in length alone.
        """
        last = tokens + max(0, answer_tokens - 1)
        passed = sum(tokens > step for step in self.steps)
        changes = any(tokens <= step < last for step in self.steps)
        grows = self.grows_from is not None and last > self.grows_from
        return passed, tokens if changes or grows else 0

    def changes_at(self, tokens: int) -> bool:
        """Whether a text of so many tokens is the shortest of other frequencies."""
        return tokens - 1 in self.steps


def length_rule(config: Any) -> LengthRule:
    """Reads from a model's configuration which lengths have frequencies of their own."""
    positions = int(getattr(config, "max_position_embeddings", None) or 0)
    steps, grows_from = set(), None
    for parameters in _rope_parameters(config):
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        if kind in ("longrope", "su"):
            sources = (parameters, vars(config))
            trained = (source.get("original_max_position_embeddings") for source in sources)
            steps.add(int(next(filter(None, trained), positions)))
        elif "dynamic" in kind:
            grows_from = positions
    return LengthRule(tuple(sorted(steps)), grows_from)


def growth(config: Any) -> float:
    """By how much positions may pass `max_position_embeddings`: 1, or the factor of dynamic scaling."""
    factors = [
        float(parameters.get("factor") or 1)
        for parameters in _rope_parameters(config)
        if "dynamic" in str(parameters.get("rope_type", parameters.get("type", "")))
    ]
    return max(1.0, min(factors, default=1.0))


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Parameters of rotary positions, one set or one for every type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict) and parameters:
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            return nested or [parameters]
    return []


class GrowingRotations:
    """The parts of a model that keep the frequencies of the longest text so far (dynamic NTK)."""

    def __init__(self, model: Any) -> None:
        self._parts = [part for part in model.modules() if list(_growing_prefixes(part))]

    def reset(self) -> None:
        """Puts back the frequencies that hold up to the length of pretraining."""
        for part in self._parts:
            for prefix in _growing_prefixes(part):
                device = getattr(part, f"{prefix}inv_freq").device
                original = getattr(part, f"{prefix}original_inv_freq").to(device)
                part.register_buffer(f"{prefix}inv_freq", original, persistent=False)
                setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)


def _growing_prefixes(part: Any) -> Iterator[str]:
    """Beginnings of the names of frequencies that grow: one, or one for every type of layer."""
    kinds = getattr(part, "rope_type", None)
    for layer_type, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
        prefix = f"{layer_type}_" if layer_type else ""
        if "dynamic" in str(kind) and hasattr(part, f"{prefix}original_inv_freq"):
            yield prefix
