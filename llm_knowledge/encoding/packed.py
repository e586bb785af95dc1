"""Texts end to end through a model, without padding: attention alone is told where each begins.

The tokens of a batch form one row, so that no position is computed for nothing. Of the last layer, only
the tokens that are pooled are computed. Works for models that call the attention which their
configuration names, as those of transformers do; `Encoder` compares once and goes without
otherwise.

Shape legend: B texts, T tokens of all of them, P tokens of a shared prefix, D hidden size, H heads,
E size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llm_knowledge.encoding.prefix import SharedPrefix, supports_sharing

NAME = "packed"
# What an attention may be told beside what is served here; None, False and 0: nothing of the kind.
_UNSERVED = ("sliding_window", "softcap", "s_aux", "position_bias")


class _GotKeys(Exception):
    """The keys and values of all tokens are known: the rest of the layer is not needed for them."""


@dataclass
class _Batch:
    """What the attention has to know of the batch that is running.

    Attributes:
        spans: of every text, its first token and the one behind its last, within the row.
        prefix: keys and values in front of every text, by layer.
        mask_TT: additive causal mask of the longest text behind the prefix, or None.
        pooled_B: positions of every text's first or last token if nothing else is pooled, else None.
        keys: keys and values of the last layer while only the pooled tokens of it are computed.
        collects: whether the last layer is to leave its keys and values in `keys`.
    """

    spans: list[tuple[int, int]]
    prefix: SharedPrefix | None = None
    mask_TT: torch.Tensor | None = None
    pooled_B: torch.Tensor | None = None
    keys: tuple[torch.Tensor, torch.Tensor] | None = None
    collects: bool = False


_RUNNING: ContextVar[_Batch] = ContextVar("packed batch")


def _attend(
    module: Any,
    query_1HTE: torch.Tensor,
    key_1HTE: torch.Tensor,
    value_1HTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every text to itself and the prefix, in transformers' calling convention."""
    batch = _RUNNING.get()
    given = [others[name] for name in _UNSERVED if others.get(name) is not None]
    if attention_mask is not None or any(torch.is_tensor(value) or value for value in given):
        raise NotImplementedError("attention with a mask, a window or a bias of its own")
    if batch.collects:
        batch.keys = (key_1HTE, value_1HTE)
        raise _GotKeys
    only_pooled = batch.keys is not None
    if batch.keys is not None:
        key_1HTE, value_1HTE = batch.keys
    causal = bool(getattr(module, "is_causal", True)) and not only_pooled
    # A head of a value may be smaller than that of a key (DeepSeek's latent attention).
    shape = (*query_1HTE.transpose(1, 2).shape[:3], value_1HTE.shape[3])
    out_1THE = query_1HTE.new_empty(shape)
    grouped = query_1HTE.shape[1] != key_1HTE.shape[1]
    for row, (start, stop) in enumerate(batch.spans):
        asks = slice(row, row + 1) if only_pooled else slice(start, stop)
        keys, values = key_1HTE[:, :, start:stop], value_1HTE[:, :, start:stop]
        mask = None
        if batch.prefix is not None:
            keys, values = _behind(batch.prefix.states[module.layer_idx], keys, values)
            if causal and batch.mask_TT is not None:
                mask = batch.mask_TT[: stop - start, : keys.shape[2]]
        attended_1HTE = scaled_dot_product_attention(
            query_1HTE[:, :, asks],
            keys,
            values,
            attn_mask=mask,
            scale=scaling,
            enable_gqa=grouped,
            is_causal=causal and mask is None,
        )
        out_1THE[:, asks] = attended_1HTE.transpose(1, 2)
    return out_1THE, None


def _behind(
    before: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, H, T, E] behind those of a prefix [1, H, P, E]."""
    return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


AttentionInterface.register(NAME, _attend)


class Packing:
    """A model that reads packed texts.

    Attributes:
        prunes: whether the last layer is computed for the last tokens alone, where they suffice.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.plain = model.config._attn_implementation
        layers: Any = getattr(model, "layers", None)
        self.prunes = isinstance(layers, torch.nn.ModuleList) and len(layers) > 0
        if self.prunes:
            _compute_pooled_only(layers[-1])

    @contextmanager
    def _running(self, batch: _Batch) -> Iterator[None]:
        token = _RUNNING.set(batch)
        self.model.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.model.config._attn_implementation = self.plain
            _RUNNING.reset(token)

    def hidden(
        self, ids: Sequence[list[int]], prefix: SharedPrefix | None, layer: int, end: int | None
    ) -> torch.Tensor:
        """Hidden states of texts of which `prefix` is already computed.

        Args:
            ids: whole texts, the prefix included.
            prefix: what all of them begin with, or None.
            layer: which hidden state; -1 is the final one.
            end: 0 or -1, where only every text's first or last token is asked for; None: all.

        Returns:
            [B, D] of the tokens at `end`, or [T, D] of all tokens behind the prefix.
        """
        shared = len(prefix.tokens) if prefix else 0
        device, longest = self.model.device, max(map(len, ids)) - shared
        flat = torch.tensor(
            [token for text_ids in ids for token in text_ids[shared:]], device=device
        )
        positions = torch.cat(
            [torch.arange(shared, len(text_ids), device=device) for text_ids in ids]
        )
        stops = torch.tensor([len(text_ids) - shared for text_ids in ids]).cumsum(0)
        spans = [
            (stop - len(text_ids) + shared, stop)
            for stop, text_ids in zip(stops.tolist(), ids, strict=True)
        ]
        pooled_B = torch.tensor([span[0] if end == 0 else span[1] - 1 for span in spans])
        pooled_B, batch = pooled_B.to(device), _Batch(spans, prefix)
        if prefix is not None:
            shape = (longest, shared + longest)
            hidden = torch.ones(shape, dtype=torch.bool, device=device).triu(shared + 1)
            batch.mask_TT = torch.zeros(shape, dtype=self.model.dtype, device=device)
            batch.mask_TT.masked_fill_(hidden, float("-inf"))
        if end is not None and layer == -1 and self.prunes:
            batch.pooled_B = pooled_B
        with self._running(batch), torch.inference_mode():
            output = self.model(
                input_ids=flat[None],
                position_ids=positions[None],
                use_cache=False,
                output_hidden_states=layer != -1,
            )
            states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return states[0] if batch.pooled_B is not None or end is None else states[0][pooled_B]


def supports_packing(model: Any, causal: bool) -> bool:
    """Whether the model takes its attention from outside, and, if causal, without any window."""
    if causal and not supports_sharing(model):
        return False
    kinds = getattr(model.config, "layer_types", None) or []
    try:
        names = ("sliding_window", "local_attention")
        windows = [getattr(model.config, name, None) for name in names]
    except Exception:  # a kind of its own, of a configuration with windows that differ by layer
        return False
    if not causal and (any(windows) or any(kind != "full_attention" for kind in kinds)):
        return False
    return bool(model._can_set_attn_implementation())


def _compute_pooled_only(layer: Any) -> None:
    """Lets a layer of all tokens become one of the pooled tokens where the running batch wants it.

    Keys and values are computed for all tokens first (its attention stops there), then everything
    for the pooled tokens alone.
    """
    plain = layer.forward

    def forward(hidden_1TD: torch.Tensor, *args: Any, **options: Any) -> Any:
        batch = _RUNNING.get(None)
        if batch is None or batch.pooled_B is None:
            return plain(hidden_1TD, *args, **options)
        batch.collects = True
        try:
            plain(hidden_1TD, *args, **options)
            raise NotImplementedError("a layer without the attention of its configuration")
        except _GotKeys:
            batch.collects = False
        pooled_B, tokens = batch.pooled_B, hidden_1TD.shape[1]
        named = {name: _pick(value, pooled_B, tokens) for name, value in options.items()}
        placed = (_pick(value, pooled_B, tokens) for value in args)
        return plain(hidden_1TD[:, pooled_B], *placed, **named)

    layer.forward = forward


def _pick(value: Any, pooled_B: torch.Tensor, tokens: int) -> Any:
    """What belongs to tokens [1, T, ...] (their places and rotations) for the pooled ones alone."""
    if isinstance(value, tuple):
        return tuple(_pick(part, pooled_B, tokens) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value[:, pooled_B]
    return value
