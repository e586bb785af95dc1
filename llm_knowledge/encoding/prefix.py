"""The keys and values of tokens that all texts begin with: computed once, shared by all batches.

Shape legend: B texts, P tokens of the prefix, D hidden size, H heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class _SharedLayer(DynamicLayer):
    """Keys and values in front of a batch's own; the batch's own are not kept.

    The layer that ships with transformers grows with every forward: it would have to be copied for
    each batch, and would hold the states of all layers until the end of it.
    """

    def __init__(self, keys_BHPE: torch.Tensor, values_BHPE: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys_BHPE, values_BHPE
        self.dtype, self.device, self.is_initialized = keys_BHPE.dtype, keys_BHPE.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared and the batch's own keys and values, along the tokens."""
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens with their keys and values in every layer, and their hidden states.

    Attributes:
        tokens: [P] token ids.
        states: per layer, keys and values [1, H, P, E].
        hidden_PD: float32 hidden states of the pooled layer, for mean pooling.
    """

    tokens: tuple[int, ...]
    states: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    hidden_PD: torch.Tensor

    def cut(self, length: int) -> SharedPrefix:
        """The first `length` tokens; views, since a causal model's states depend on no later token."""
        if length == len(self.tokens):
            return self
        states = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.states)
        return SharedPrefix(self.tokens[:length], states, self.hidden_PD[:length])

    def cache(self, batch: int) -> Cache:
        """A cache for one forward of `batch` texts: expanded views, no copy."""
        shape = (batch, -1, -1, -1)
        return Cache(
            layers=[
                _SharedLayer(keys.expand(shape), values.expand(shape))
                for keys, values in self.states
            ]
        )


def supports_sharing(model: Any) -> bool:
    """Whether every layer keeps plain keys and values: no sliding window, no recurrent state."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def compute_prefix(model: Any, tokens: Sequence[int], layer: int) -> SharedPrefix | None:
    """Runs the prefix once; None if the model fills its cache in another way than expected."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.inference_mode():
        output = model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=layer != -1,
        )
    hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    expected = (1, len(tokens))
    if not all(kept.is_initialized and kept.keys.shape[:3:2] == expected for kept in cache.layers):
        return None
    states = tuple((kept.keys, kept.values) for kept in cache.layers)
    return SharedPrefix(tuple(tokens), states, hidden[0].float())


def shared_length(ids: Sequence[list[int]]) -> int:
    """Number of leading tokens that all texts have in common; every text keeps one more."""
    first, last = min(ids), max(ids)  # all others lie between them in lexicographic order
    most = min(map(len, ids)) - 1
    differing = (index for index in range(most) if first[index] != last[index])
    return next(differing, max(0, most))
