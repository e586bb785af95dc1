"""Texts to token ids: one user message in the model's chat template, or the text as it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from llm_knowledge.encoding.chat import ChatTokens, without_controls

# Prompts are counted before they are encoded: the ids of this many are kept in between.
KEPT_TEXTS = 4096
T = TypeVar("T")


class Tokens:
    """A tokenizer with what stands around every text.

    Nothing inside a text becomes a special token ("[SEP]" in a title stays plain text); those of
    the chat template do.

    Attributes:
        chat: the chat template around every text; None where none is used.
        chat_hash: hex digest of the rendered chat template; None where none is used.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, chat: bool, answers: bool = False) -> None:
        """Renders the chat template around one user message, if `chat` and there is one.

        Args:
            tokenizer: of transformers.
            max_tokens: most tokens of a text, those of the chat template included.
            chat: whether to use the chat template.
            answers: whether the model goes on from a text.

        Raises:
            InputError: the chat template cannot take one user message.
        """
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        tokenizer.truncation_side = "right"  # the instruction stands first and must stay
        with_chat = chat and getattr(tokenizer, "chat_template", None)
        self.chat = ChatTokens(tokenizer, answers) if with_chat else None
        self.chat_hash = self.chat.hash if self.chat else None
        self._special = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._kept: dict[str, list[int]] = {}

    def ids(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        """Token ids of texts; those above `max_tokens` lose the end of the text if asked."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        fresh = dict(zip(new, self._whole(new), strict=True)) if new else {}
        known = [fresh[text] if text in fresh else self._kept[text] for text in texts]
        if len(self._kept) + len(fresh) > KEPT_TEXTS:
            self._kept = {}
        if len(fresh) <= KEPT_TEXTS:
            self._kept |= fresh
        if truncate:
            long = [row for row, ids in enumerate(known) if len(ids) > self.max_tokens]
            for row, ids in zip(long, self._cut([texts[row] for row in long]), strict=True):
                known[row] = ids
        return known

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return self.chat.ids(texts) if self.chat else self._plain(texts)

    def _cut(self, texts: list[str]) -> list[list[int]]:
        if self.chat:
            return [self.chat.cut(text, self.max_tokens) for text in texts]
        return self._plain(texts, truncation=True, max_length=self.max_tokens) if texts else []

    def _plain(self, texts: list[str], **truncation: Any) -> list[list[int]]:
        """Ids of texts as they stand, with the special tokens that the tokenizer puts around them."""
        encoded = self.tokenizer(
            texts,
            split_special_tokens=True,
            return_special_tokens_mask=self.tokenizer.is_fast,
            verbose=False,
            **truncation,
        )
        if not self.tokenizer.is_fast:  # the mask of others also covers what a text spells
            return encoded["input_ids"]
        return [
            self._without_forged(ids, mask)
            for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]

    def _without_forged(self, ids: list[int], mask: list[int]) -> list[int]:
        """Ids without special tokens but for those that stand around the text (mask 1)."""
        start = mask.index(0) if 0 in mask else len(ids)
        stop = len(ids) - mask[::-1].index(0) if 0 in mask else len(ids)
        unknown = self.tokenizer.unk_token_id
        return ids[:start] + without_controls(ids[start:stop], self._special, unknown) + ids[stop:]


def split_paragraphs(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The paragraphs of texts (blank lines part them), and how many each text has, int64 [texts]."""
    divided = [[p for p in text.split("\n\n") if p.strip()] or [text] for text in texts]
    counts = np.array([len(paragraphs) for paragraphs in divided], int)
    return [paragraph for paragraphs in divided for paragraph in paragraphs], counts


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; the next one is made in a background thread while one is in use."""
    end, source = object(), iter(items)
    with ThreadPoolExecutor(1) as pool:
        waiting = deque([pool.submit(next, source, end)])
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]


def pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [B, T] padded at the right, and which of them are tokens, bool [B, T].

    Padding is any token: the mask hides it (as causality does), so that a tokenizer needs no
    padding token.
    """
    lengths = torch.tensor([len(text_ids) for text_ids in ids])
    ids_BT = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, text_ids in enumerate(ids):
        ids_BT[row, : len(text_ids)] = torch.tensor(text_ids)
    return ids_BT, torch.arange(ids_BT.shape[1])[None] < lengths[:, None]
