"""Texts to token ids: one user message in the model's chat template, or the text as it stands."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    pass

# Stands for the text while the chat template is rendered; no template holds it.
_PLACE = "\u2042the text\u2042"
# Prompts are counted before they are encoded: the ids of this many are kept in between.
KEPT_TEXTS = 4096
T = TypeVar("T")


class Tokens:
    """A tokenizer with what stands around every text.

    Nothing inside a text becomes a special token ("[SEP]" in a title stays plain text); those of
    the chat template do.

    Attributes:
        head, tail: token ids of the chat template before and after the text, or empty.
        chat_hash: hex digest of the rendered chat template; None where none is used.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, chat: bool) -> None:
        """Render the chat template around one user message, if ``chat`` and there is one.

        Raises:
            InputError: the chat template cannot take one user message.
        """
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        tokenizer.truncation_side = "right"  # the instruction stands first and must stay
        self.head: list[int] = []
        self.tail: list[int] = []
        self.chat_hash: str | None = None
        self._kept: dict[str, list[int]] = {}
        if chat and getattr(tokenizer, "chat_template", None):
            before, after = _render_chat(tokenizer)
            self.chat_hash = hashlib.blake2b(
                f"{before}\0{after}".encode(), digest_size=16
            ).hexdigest()
            self.head, self.tail = (
                tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                if part
                else []
                for part in (before, after)
            )

    def ids(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        """Token ids of texts; those above ``max_tokens`` lose the end of the text if asked."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        fresh = dict(zip(new, self._plain(new), strict=True)) if new else {}
        known = [fresh[text] if text in fresh else self._kept[text] for text in texts]
        if len(self._kept) + len(fresh) > KEPT_TEXTS:
            self._kept = {}
        if len(fresh) <= KEPT_TEXTS:
            self._kept |= fresh
        room = self.max_tokens - len(self.head) - len(self.tail)
        if not truncate:
            room = 1 << 60
        long = [row for row, own in enumerate(known) if len(own) > room]
        for row, own in zip(long, self._plain([texts[row] for row in long], room), strict=True):
            known[row] = own
        if not self.chat_hash:
            return known
        return [self.head + own + self.tail for own in known]

    def _plain(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Ids of the texts alone, with the tokenizer's own special tokens where no chat is used."""
        if not texts:
            return []
        cut = {} if limit is None else {"truncation": True, "max_length": max(1, limit)}
        said = self.tokenizer(list(texts), split_special_tokens=True, verbose=False,
                              add_special_tokens=not self.chat_hash, **cut)  # fmt: skip
        return said["input_ids"]


def _render_chat(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after a user message."""
    message = [{"role": "user", "content": _PLACE}]
    try:
        # Some templates write today's date: a fixed one keeps the vectors of all days comparable.
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True,
                                             date_string="01 Jan 2025")  # fmt: skip
    except Exception as error:  # the template is a program of the model's author
        raise InputError(f"the model's chat template cannot be applied to one user message "
                         f"({error}); use --chat-template off") from error  # fmt: skip
    if text.count(_PLACE) != 1:
        raise InputError("the model's chat template does not hold the user message once, as it "
                         "stands; use --chat-template off")  # fmt: skip
    before, _, after = text.partition(_PLACE)
    return before, after


def split_paragraphs(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The paragraphs of texts (blank lines part them), and how many each text has, int64 [texts]."""
    parts = [[p for p in text.split("\n\n") if p.strip()] or [text] for text in texts]
    return [part for own in parts for part in own], np.array([len(own) for own in parts], int)


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
    lengths = torch.tensor([len(own) for own in ids])
    ids_BT = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, own in enumerate(ids):
        ids_BT[row, : len(own)] = torch.tensor(own)
    return ids_BT, torch.arange(ids_BT.shape[1])[None] < lengths[:, None]
