"""Token ids to vectors, batch by batch: by length, and behind a shared prefix where that pays.

Shape legend: B texts, T tokens, P tokens of a shared prefix, D hidden size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llm_knowledge.encoding.prefix import shared_length
from llm_knowledge.encoding.reader import SHAPE_ERRORS, Reader, out_of_memory
from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    from llm_knowledge.encoding.answers import Answers
    from llm_knowledge.encoding.counters import Counters
    from llm_knowledge.encoding.prefix import SharedPrefix

# A prefix is shared from so many tokens, texts and share of all tokens on: below, it gains nothing.
PREFIX_TOKENS, PREFIX_TEXTS, PREFIX_SHARE = 16, 4, 0.1
# A way of reading is tried once, on the beginnings of two texts, of so many tokens.
TRIED_TOKENS = 24
# Cosine of two vectors of the same text, by the precision of the model, that are called the same.
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}


@dataclass(frozen=True)
class ReadingPlan:
    """How batches are made and what is asked of them.

    Attributes:
        name: of the model, for messages.
        precision: of the model, a key of `LEAST_COSINE`.
        share: whether a common prefix may be computed once.
        must_pack: whether a model that cannot read packed batches is refused.
        path: whether the vector is of the step that chose an answer's last token.
    """

    name: str
    precision: str
    share: bool
    must_pack: bool
    path: bool


class BatchedReader:
    """A reader of batches, and how texts are divided into them.

    Attributes:
        reader: reads one batch.
        answers: writes answers, or None.
        batch_tokens: computed tokens of one batch, padding included; halved when memory runs out.
        counters: what was done so far.
        prefix: what the last texts began with, already computed; None before any was.
    """

    def __init__(
        self,
        reader: Reader,
        answers: Answers | None,
        plan: ReadingPlan,
        batch_tokens: int,
        counters: Counters,
    ) -> None:
        self.reader, self.answers, self.plan = reader, answers, plan
        self.batch_tokens, self.counters = batch_tokens, counters
        self.prefix: SharedPrefix | None = None
        self._share, self._share_checked = plan.share and reader.shares, False
        self._packs_checked = self._answers_checked = False
        self._by_length, self._padded_tokens = False, 0

    def read(self, ids: list[list[int]], said: list[str] | None = None) -> np.ndarray:
        """Vectors of tokenised texts: float32 [len(ids), D].

        Args:
            ids: token ids of every text, none empty.
            said: where the answers are appended, in the order of the texts.

        Raises:
            InputError: one text alone does not fit into memory, or packed batches or answers are
                asked for of a model that cannot give them.
        """
        out = np.empty((len(ids), self.reader.dim), np.float32)
        if not ids:
            return out
        begun = time.perf_counter()
        self._check_packing(ids)
        self._check_padding(ids)
        self._check_answers(ids)
        prefix = self._prefix_of(
            [text_ids for text_ids in ids if self.reader.lengths.is_short(len(text_ids))]
        )
        texts = [""] * len(ids)
        waiting = list(self._batches(ids, prefix))[::-1]
        while waiting:
            rows, behind = waiting.pop()
            try:
                out[rows], answers = self._read_batch([ids[row] for row in rows], behind)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise InputError(
                        f"out of memory on one text of {len(ids[rows[0]])} tokens; lower max_tokens"
                    ) from error
                self.batch_tokens = max(1, self.batch_tokens // 2)
                half = len(rows) // 2
                waiting += [(rows[half:], behind), (rows[:half], behind)]
                continue
            for row, text in zip(rows, answers, strict=False):
                texts[row] = text
            self.counters.reused += len(behind.tokens) * len(rows) if behind else 0
        if said is not None:
            said += texts
        self.counters.tokens += sum(map(len, ids))
        self.counters.seconds += time.perf_counter() - begun
        return out

    def _read_batch(
        self, ids: list[list[int]], prefix: SharedPrefix | None
    ) -> tuple[np.ndarray, list[str]]:
        """One batch's vectors, and its answers where they are wanted."""
        if self.answers is not None:
            return self._answer(ids, prefix)
        return (self._forward(ids, prefix) if prefix else self._forward(ids)), []

    def _prefix_of(self, ids: list[list[int]]) -> SharedPrefix | None:
        """The states of what all these texts begin with, from an earlier call where possible."""
        if not self._share or not ids:
            return None
        common = shared_length(ids)
        if common < max(PREFIX_TOKENS, PREFIX_SHARE * sum(map(len, ids)) / len(ids)):
            return None
        if self.prefix is not None:
            both = shared_length([[*self.prefix.tokens, -1], [*ids[0][:common], -2]])
            # Texts that happen to agree on a little more do not make a new prefix worth while.
            if both >= 0.8 * common or (both >= PREFIX_TOKENS and len(ids) < PREFIX_TEXTS):
                return self.prefix.cut(both)
        if len(ids) < PREFIX_TEXTS:
            return None
        self.prefix = self.reader.prefix(ids[0][:common])
        self.counters.computed += common
        if self.prefix is None or not (self._share_checked or self._agrees(ids, self.prefix)):
            self._share = False
            return None
        self._share_checked = True
        return self.prefix

    def _agrees(self, ids: list[list[int]], prefix: SharedPrefix) -> bool:
        """Whether this model gives the same vectors with the prefix as without; tried once."""
        two = _middle(ids, len(prefix.tokens) + TRIED_TOKENS)
        try:
            if self._same(self._forward(two), self._forward(two, prefix)):
                return True
        except SHAPE_ERRORS as error:
            _raise_out_of_memory(error)
        warnings.warn(
            f"{self.plan.name}: its vectors change when the prompts' common beginning is computed "
            f"once; each prompt is computed whole",
            stacklevel=2,
        )
        return False

    def _check_packing(self, ids: list[list[int]]) -> None:
        """Compares packed with padded vectors once; pads from then on if they differ."""
        if self._packs_checked or self.reader.packing is None:
            return
        self._packs_checked = True
        two, packing = _middle(ids, TRIED_TOKENS), self.reader.packing
        try:
            packed = self.reader.read(two).cpu().numpy()
        except SHAPE_ERRORS as error:  # an attention with a mask, a bias or shapes of its own
            _raise_out_of_memory(error)
            packed = np.zeros((len(two), self.reader.dim), np.float32)
        self.reader.packing = None
        if self._same(self.reader.read(two).cpu().numpy(), packed):
            self.reader.packing = packing
        elif self.plan.must_pack:
            raise InputError("--attention packed: this model has an attention of its own; use auto")

    def _check_padding(self, ids: list[list[int]]) -> None:
        """Compares a short text alone with the same beside a long one.

        Where padding changes it, texts of one batch are equally long from then on: models that mix
        all positions, or look at neighbours, do not mask it (FNet, ConvBERT, Nystroemformer). Some do
        otherwise above a length: the check is made again for texts twice as long.
        """
        if self._by_length or self.reader.packing is not None:
            return
        texts = [text_ids for text_ids in ids if self.reader.lengths.group(len(text_ids)) == (0, 0)]
        shortest, longest = min(texts, key=len, default=[]), max(texts, key=len, default=[])
        if len(shortest) == len(longest) or len(longest) <= 2 * self._padded_tokens:
            return
        self._padded_tokens = len(longest)
        try:
            alone = self.reader.read([shortest]).cpu().numpy()
            beside = self.reader.read([shortest, longest])[:1].cpu().numpy()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return  # the batches find it out for themselves
        self._by_length = not self._same(alone, beside)

    def _check_answers(self, ids: list[list[int]]) -> None:
        """Compares a first step of answers with whole texts, once.

        Where padding changes them, texts of one batch are equally long from then on.

        Raises:
            InputError: the model does not go on from states that are kept as `Answers` keeps them.
        """
        if self.answers is None or self._answers_checked:
            return
        lengths, limit = self.reader.lengths, self.answers.limit
        groups = [lengths.group(len(text_ids), limit) for text_ids in ids]
        usual = next((group for group in groups if group[1] == 0), None)
        texts = [text_ids for text_ids, group in zip(ids, groups, strict=True) if group == usual]
        if not texts:  # all come to other frequencies on the way
            return
        self._answers_checked = True
        shortest, longest = min(texts, key=len), max(texts, key=len)
        if not self.answers.by_length and not self._goes_on([shortest, longest]):
            self.answers.by_length = True
        if self.answers.by_length and not self._goes_on([longest]):
            raise InputError(
                f"--answer-tokens: {self.plan.name} does not go on from the states that are kept of "
                f"a prompt; extract without answers, or use another model"
            )

    def _goes_on(self, ids: list[list[int]]) -> bool:
        assert self.answers is not None
        try:
            kept, whole = self.reader.goes_on(self.answers, ids)
        except SHAPE_ERRORS as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                most = max(map(len, ids))
                raise InputError(
                    f"out of memory on {len(ids)} texts of up to {most} tokens and their answers; "
                    f"lower max_tokens"
                ) from error
            return False
        return self._same(kept.cpu().numpy(), whole.cpu().numpy())

    def _same(self, vectors: np.ndarray, others: np.ndarray) -> bool:
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
        least = LEAST_COSINE[self.plan.precision]
        return bool(((vectors * others).sum(1) >= least * norms).all() and (norms > 0).all())

    def _batches(
        self, ids: list[list[int]], prefix: SharedPrefix | None
    ) -> Iterator[tuple[list[int], SharedPrefix | None]]:
        """Row numbers of batches, and what they are read behind.

        The longest come first: memory runs out at once or never. Texts of other rotary frequencies
        never share a batch, nor does a prefix serve any but the short ones.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        answer_tokens = self.answers.limit if self.answers else 0
        for row in sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row)):
            group = self.reader.lengths.group(len(ids[row]), answer_tokens)
            if self._by_length or (self.answers and self.answers.by_length):
                group = (group[0], len(ids[row]))
            groups.setdefault(group, []).append(row)
        for rows in groups.values():
            behind = prefix if self.reader.lengths.is_short(len(ids[rows[0]])) else None
            shared = len(behind.tokens) if behind else 0
            for batch in self._by_size(rows, [len(text_ids) for text_ids in ids], shared):
                yield batch, behind

    def _by_size(self, rows: list[int], lengths: list[int], shared: int) -> Iterator[list[int]]:
        """Rows, longest first, in batches by computed tokens.

        A shared token costs no computation, but its keys and values are read: a quarter of a token.
        """
        batch: list[int] = []
        size = 0
        for row in rows:
            width = lengths[row] - shared + shared // 4
            if batch and not self.reader.packing:
                width = lengths[batch[0]] - shared + shared // 4
            if batch and size + width > self.batch_tokens:
                yield batch
                batch, size, width = [], 0, lengths[row] - shared + shared // 4
            batch.append(row)
            size += width
        if batch:
            yield batch

    def _forward(self, ids: list[list[int]], prefix: SharedPrefix | None = None) -> np.ndarray:
        """One batch through the model, behind the prefix if given: float32 [B, D]."""
        self._count_positions(ids, prefix)
        return self.reader.read(ids, prefix).cpu().numpy()

    def _answer(
        self, ids: list[list[int]], prefix: SharedPrefix | None
    ) -> tuple[np.ndarray, list[str]]:
        """As `_forward`, and what the model says to each text."""
        assert self.answers is not None
        self._count_positions(ids, prefix)
        vectors, said = self.reader.answer(self.answers, ids, prefix, self.plan.path)
        return vectors.cpu().numpy(), said

    def _count_positions(self, ids: list[list[int]], prefix: SharedPrefix | None) -> None:
        computed, shared = self.reader.positions(ids, prefix), len(prefix.tokens) if prefix else 0
        self.counters.computed += computed
        self.counters.padding += computed - sum(map(len, ids)) + shared * len(ids)


def _raise_out_of_memory(error: Exception) -> None:
    """Raises an error again that says nothing about a way of reading."""
    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error


def _middle(ids: list[list[int]], tokens: int) -> list[list[int]]:
    """Beginnings of two texts of middle length, one shorter, to try a way of reading on."""
    two = sorted(ids, key=len)[len(ids) // 2 :][:2]
    return [text_ids[: tokens - 3 * row] for row, text_ids in enumerate(two)]
