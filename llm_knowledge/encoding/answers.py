"""An answer beside the vector, in one pass: greedy, the prompt's states are those of the first step.

Shape legend: B texts, T tokens of the longest, P tokens of a shared prefix, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from llm_knowledge.encoding.loading import text_model
from llm_knowledge.encoding.prefix import supports_sharing
from llm_knowledge.encoding.rotations import length_rule
from llm_knowledge.encoding.tokens import pad

if TYPE_CHECKING:
    from llm_knowledge.encoding.prefix import SharedPrefix


class Answers:
    """A causal language model that goes on from a prompt.

    Attributes:
        model: the language model without its head, as `Encoder.model`.
        head: hidden states to scores over the vocabulary.
        limit: most tokens of an answer.
        ends: ids of the tokens that end one.
        by_length: whether texts of one batch have to be equally long. Padding stands between a
            shorter one and its answer: in a window, or where distances are counted, it matters.
    """

    def __init__(self, language_model: Any, limit: int, tokenizer: Any) -> None:
        self.model = text_model(getattr(language_model, language_model.base_model_prefix))
        self.head = language_model.get_output_embeddings()
        self.limit, self.tokenizer = limit, tokenizer
        self._lengths = length_rule(self.model.config)
        local = "local" in (getattr(self.model.config, "attention_layers", None) or ())
        self.by_length = local or not supports_sharing(self.model)
        ends = getattr(language_model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}

    def generate(
        self, ids: list[list[int]], prefix: SharedPrefix | None, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Reads one batch of texts and goes on from each.

        The most likely token is taken each time, until one of `ends` or `limit` tokens.

        Args:
            ids: whole texts, the prefix included.
            prefix: what all of them begin with, or None.
            layer: which hidden state; -1 is the final one.

        Returns:
            Hidden states [B, T - P, D] behind the prefix; which of them are tokens, bool
            [B, T - P]; float32 [B, D] of the step that chose the answer's last token (the last step
            of the generation path: for an answer of one token, the prompt's end); the answers.
        """
        device, shared = self.model.device, len(prefix.tokens) if prefix else 0
        ids_BT, mask_BT = pad([text_ids[shared:] for text_ids in ids])
        mask_BT = mask_BT.to(device)
        rows_B, count_B = torch.arange(len(ids), device=device), mask_BT.sum(1)
        cache = self._cache(prefix, len(ids))
        seen_BT = torch.cat([mask_BT.new_ones((len(ids), shared)), mask_BT], dim=1)
        place_BT = torch.arange(shared, seen_BT.shape[1], device=device).expand(len(ids), -1)
        top_BTD, hidden_BTD = self._step(ids_BT.to(device), seen_BT, place_BT, cache, layer)
        top_BD = top_BTD[rows_B, count_B - 1]
        state_BD = hidden_BTD[rows_B, count_B - 1].float()
        done_B = torch.zeros(len(ids), dtype=torch.bool, device=device)
        ends = torch.tensor(sorted(self.ends), device=device)
        fed: list[torch.Tensor] = []
        said: list[torch.Tensor] = []
        for step in range(self.limit):
            fed.append(self.head(top_BD).argmax(-1))
            said.append(torch.where(done_B, -1, fed[-1]))
            done_B = done_B | torch.isin(fed[-1], ends)
            if step == self.limit - 1 or bool(done_B.all()):
                break
            if self._lengths.changes_at(len(ids[0]) + len(fed)):
                # Keys of other frequencies are of no use. All texts of such a batch are equally long.
                cache = self._cache(None, len(ids))
                new_BT = torch.cat([torch.tensor(ids, device=device), torch.stack(fed, 1)], 1)
                place_BT = torch.arange(new_BT.shape[1], device=device).expand(len(ids), -1)
                seen_BT = torch.ones_like(new_BT, dtype=torch.bool)
            else:
                new_BT, place_BT = fed[-1][:, None], (shared + count_B + step)[:, None]
                seen_BT = torch.cat([seen_BT, seen_BT.new_ones((len(ids), 1))], dim=1)
            top, hidden = self._step(new_BT, seen_BT, place_BT, cache, layer)
            top_BD = top[:, -1]
            # A text that has ended is still computed, and no longer looked at.
            state_BD = torch.where(done_B[:, None], state_BD, hidden[:, -1].float())
        return hidden_BTD, mask_BT, state_BD, self._texts(torch.stack(said, dim=1))

    def second_states(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The state behind a first answered token, from kept states and from the whole text.

        A model that keeps its states in another way than `generate` hands them on gives others.

        Args:
            ids: whole texts, read as one batch.

        Returns:
            Final hidden states, float32 [B, D] each.
        """
        device, cache = self.model.device, self._cache(None, len(ids))
        ids_BT, seen_BT = (tensor.to(device) for tensor in pad(ids))
        place_BT = torch.arange(ids_BT.shape[1], device=device).expand(len(ids), -1)
        top_BTD, _ = self._step(ids_BT, seen_BT, place_BT, cache, -1)
        count_B = seen_BT.sum(1)
        top_BD = top_BTD[torch.arange(len(ids), device=device), count_B - 1]
        token_B = self.head(top_BD).argmax(-1)
        seen_BT = torch.cat([seen_BT, seen_BT.new_ones((len(ids), 1))], dim=1)
        kept, _ = self._step(token_B[:, None], seen_BT, count_B[:, None], cache, -1)
        wholes = (
            torch.tensor([[*text, token]], device=device)
            for text, token in zip(ids, token_B.tolist(), strict=True)
        )
        states = [
            self.model(input_ids=whole, use_cache=False).last_hidden_state[0, -1]
            for whole in wholes
        ]
        return kept[:, -1].float(), torch.stack(states).float()

    def _cache(self, prefix: SharedPrefix | None, batch: int) -> DynamicCache:
        """Keys and values of a prefix, of which every text of a batch has a copy."""
        cache = DynamicCache(config=self.model.config)
        for number, states in enumerate(prefix.states if prefix else ()):
            keys, values = (state.expand(batch, -1, -1, -1) for state in states)
            cache.update(keys, values, number)
        return cache

    def _texts(self, said_BT: torch.Tensor) -> list[str]:
        """Tokens as texts, without special tokens and what stands behind the end (-1)."""
        return [
            self.tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True)
            for row in said_BT.tolist()
        ]

    def _step(
        self,
        ids_BT: torch.Tensor,
        seen_BT: torch.Tensor,
        place_BT: torch.Tensor,
        cache: DynamicCache,
        layer: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The final hidden states of new tokens, which the head reads, and those of `layer`."""
        output = self.model(
            input_ids=ids_BT,
            attention_mask=seen_BT.long(),
            position_ids=place_BT,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=layer != -1,
        )
        top = output.last_hidden_state
        return top, top if layer == -1 else output.hidden_states[layer]
