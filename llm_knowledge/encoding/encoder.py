"""A frozen Hugging Face model as a function from texts to pooled vectors.

Shape legend: B texts, T tokens, P tokens of a shared prefix, D hidden size.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm_knowledge.encoding.loading import (
    check_layer,
    find_device,
    load,
    refuse_answers,
    text_model,
    token_limit,
)
from llm_knowledge.encoding.model_files import default_model_path as default_model_path
from llm_knowledge.encoding.model_files import find_model, model_kind, read_json, weights_hash
from llm_knowledge.encoding.tokens import Tokens, ahead, split_paragraphs
from llm_knowledge.errors import InputError
from llm_knowledge.vectors import join_parts, unit_length

if TYPE_CHECKING:
    from llm_knowledge.encoding.answers import Answers
    from llm_knowledge.encoding.prefix import SharedPrefix
    from llm_knowledge.encoding.reader import Attention, Compilation

# The states of 2048 tokens stay near a CPU's cache; an accelerator wants more in flight.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 65_536
# Texts that are sorted by length together; the next ones are tokenised meanwhile.
BLOCK_TEXTS = 1024
# A prefix is shared from so many tokens, texts and share of all tokens on: below, it gains nothing.
PREFIX_TOKENS, PREFIX_TEXTS, PREFIX_SHARE = 16, 4, 0.1

# A way of reading is tried once, on the beginnings of two texts. A model that it does not suit may
# raise any of these.
TRIED_TOKENS = 24
SHAPE_ERRORS = (
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
)

Pooling = Literal["auto", "mean", "paragraphs", "last"]
State = Literal["prompt", "answer"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass
class Counters:
    """What an encoder has done so far.

    Attributes:
        texts: number of texts.
        tokens: their tokens.
        reused: those of them whose states came from a shared prefix.
        computed: positions that went through the model, padding included.
        padding: positions that held no token.
        seconds: time in the model.
    """

    texts: int = 0
    tokens: int = 0
    reused: int = 0
    computed: int = 0
    padding: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        return (f"{rate:,.0f} tokens/s, padding {self.padding / max(1, self.computed):.0%}, "
                f"reused {self.reused / max(1, self.tokens):.0%}")  # fmt: skip


class Encoder:
    """A frozen model, its tokenizer and how hidden states become one vector per text.

    Attributes:
        name, revision, weights_hash: which model, for the manifest.
        kind: "encoder" or "decoder".
        pooling: "mean" over the real tokens; "paragraphs": of each paragraph, read as a text of its
            own, then over them; or "last" real token.
        max_tokens: longer texts are truncated at the end; prompts are built to fit.
        dim: length of a vector.
        normalize: whether vectors are scaled to length 1.
        chat_hash: hash of the chat template around every text, None without one.
        counters: texts, tokens, padding and reuse so far.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        pooling: Pooling = "auto",
        layer: int = -1,
        dtype: Precision = "auto",
        max_tokens: int | None = None,
        normalize: bool | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        device: str | None = None,
        batch_tokens: int | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        prefix_reuse: Literal["auto", "off"] = "auto",
        attention: Attention = "auto",
        compilation: Compilation = "off",
        backend: Literal["transformers", "vllm"] = "transformers",
        answer_tokens: int = 0,
        state: State = "prompt",
    ) -> None:
        """Load the model, without its language-model head unless answers are wanted.

        Args:
            model: directory, or name on the hub; None is the packaged MiniLM sentence encoder.
            pooling: "auto" is paragraphs for encoders and last for decoders.
            layer: which hidden state; -1 is the final one, after the final norm.
            dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.
            max_tokens: None is 256 for encoders, 1024 for decoders, or less if the model has less.
            normalize: None is true for encoders and false for decoders.
            trust_remote_code: run Python that comes with the model. Off by default.
            revision: branch, tag or commit on the hub.
            device: "cpu", "cuda", "cuda:0" ...; None takes an accelerator where there is one.
            batch_tokens: computed tokens of one batch, padding included.
            chat_template: "auto" makes every text one user message, in the chat template of a
                decoder that brings one.
            prefix_reuse: "auto" computes the keys and values of tokens that all texts begin with
                once, where the model is causal and it pays.
            attention: "packed" reads texts end to end without padding; the other names are those of
                transformers. "auto" is packed on a CPU where the model allows it, else "sdpa".
            compilation: mode of torch.compile; "off" is the only one measured.
            backend: what runs the model; "vllm" is not measured, and takes no answers.
            answer_tokens: most tokens of an answer that a decoder writes after each text; 0: none.
            state: whose hidden state the vector is: "prompt" pools the text; "answer" takes the step
                that chose the answer's last token, the end of the generation path.

        Raises:
            InputError: the model cannot be found or loaded, or an option does not fit it.
        """
        import torch

        from llm_knowledge.encoding.reader import Reader

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path, self.name, self.revision = find_model(model, revision)
        self.weights_hash = weights_hash(self.path)
        config = read_json(self.path / "config.json")
        self.kind = model_kind(config)
        accelerated = backend == "vllm"
        self.device = find_device("cpu" if accelerated else device)
        on_cpu = self.device.type == "cpu" and not accelerated
        precision = dtype if dtype != "auto" else "float32" if on_cpu else "bfloat16"
        self.dtype_name = precision
        packs = attention in ("auto", "packed")
        if compilation != "off" and attention == "packed":
            raise InputError("--compile: packed batches cannot be compiled; use --attention sdpa")
        self.answer_tokens, self.state = answer_tokens, state
        usual: Pooling = "last" if self.kind == "decoder" else "paragraphs"
        self.pooling = pooling if pooling != "auto" else usual
        if self.pooling == "paragraphs" and self.kind == "decoder":
            raise InputError("--pooling paragraphs: parts a prompt from its instruction; it is for "
                             "encoders, use last or mean")  # fmt: skip
        if accelerated and (answer_tokens or layer != -1):
            raise InputError("--backend vllm: gives the final layer of the prompt, and no answer; use "
                             "--backend transformers")  # fmt: skip
        refuse_answers(answer_tokens, state, self.kind, self.pooling)
        loaded = load(self.path, getattr(torch, precision), self.device, trust_remote_code,
                      None if packs else attention, answer_tokens > 0, config_only=accelerated)  # fmt: skip
        self.tokenizer, self.config = loaded.tokenizer, loaded.config
        self.model: Any = None if loaded.model is None else text_model(loaded.model)
        self._answers: Answers | None = None
        if answer_tokens:
            from llm_knowledge.encoding.answers import Answers

            self._answers = Answers(loaded.model, answer_tokens, loaded.tokenizer)
            self.model = self._answers.model
        self.layer = check_layer(loaded.config, layer)
        self.normalize = self.kind == "encoder" if normalize is None else normalize
        self.max_tokens = token_limit(loaded, max_tokens, self.kind, answer_tokens)
        chat = self.kind == "decoder" and chat_template == "auto"
        self._tokens = Tokens(self.tokenizer, self.max_tokens, chat, answers=answer_tokens > 0)
        self.chat_hash = self._tokens.chat_hash
        self.counters = Counters()
        self._prefix: SharedPrefix | None = None
        self._share = self._share_checked = False
        self._engine: Any = None
        of_piece = "last" if self.pooling == "last" else "mean"
        if accelerated:
            from llm_knowledge.experimental.vllm_engine import VllmEngine

            self._engine = VllmEngine(self.path, of_piece, self.kind == "decoder", precision,
                                      self.max_tokens, prefix_reuse == "auto", trust_remote_code)  # fmt: skip
        else:
            plain = compilation != "off" or (answer_tokens > 0 and packs)
            self._reader = Reader(self.model, self.kind == "decoder", of_piece, self.layer,
                                  self.normalize, "sdpa" if plain else attention)  # fmt: skip
            self._share = prefix_reuse == "auto" and self._reader.shares
        if compilation != "off":
            self.model.compile(mode=compilation, dynamic=True)
        self._packs_checked, self._must_pack = False, attention == "packed"
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self.dim = int(self.config.hidden_size)

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        return self._tokens.ids(texts, truncate)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text as the model would read it, special tokens included."""
        return [len(ids) for ids in self._tokenize(texts, truncate=False)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts: float32 [len(texts), dim], in the order of the texts.

        Texts are batched by length, so the vectors depend on the set of texts only by rounding. Out
        of memory halves the batch.

        Raises:
            InputError: a text has no token, a vector is not finite, or one text alone does not fit.
        """
        starts = range(0, len(texts), BLOCK_TEXTS)
        return self.encode_blocks(texts[at : at + BLOCK_TEXTS] for at in starts)

    def encode_blocks(self, blocks: Iterable[Sequence[str]]) -> np.ndarray:
        """As ``encode``, for texts that come in blocks: float32 [texts of all blocks, dim]."""
        return self.read(blocks)[0]

    def read(self, blocks: Iterable[Sequence[str]]) -> tuple[np.ndarray, list[str] | None]:
        """Vectors of texts that come in blocks, and answers where they are wanted.

        The next block is made (``blocks`` is advanced) and tokenised in a background thread while
        the model reads one.

        Returns:
            float32 [texts of all blocks, dim], and as many answers, or None.
        """
        answers: list[str] | None = [] if self.answer_tokens else None
        found, row = [np.empty((0, self.dim), np.float32)], 0
        for texts, parts, ids in ahead(map(self._prepare, blocks)):
            for place, tokens in zip(np.repeat(np.arange(len(texts)), parts), ids, strict=True):
                if not tokens:
                    raise InputError(f"text {row + place} has no token: {texts[int(place)][:60]!r}")
            vectors = join_parts(self._encode_ids(ids, answers), parts, self.normalize)
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if bad.size:
                raise InputError(f"text {row + bad[0]}: the model returned NaN or Inf in "
                                 f"{self.dtype_name}; try --dtype float32")  # fmt: skip
            found.append(vectors)
            self.counters.texts += len(texts)
            row += len(texts)
        return found[1] if len(found) == 2 else np.concatenate(found), answers

    def _prepare(self, texts: Sequence[str]) -> tuple[Sequence[str], np.ndarray, list[list[int]]]:
        """Texts, into how many pieces each is divided [texts], token ids of all pieces."""
        if self.pooling != "paragraphs":
            return texts, np.ones(len(texts), int), self._tokenize(texts, truncate=True)
        pieces, parts = split_paragraphs(texts)
        return texts, parts, self._tokenize(pieces, truncate=True)

    def _encode_ids(self, ids: list[list[int]], answers: list[str] | None = None) -> np.ndarray:
        """Vectors of tokenised texts, float32 [len(ids), dim], batch by batch; appends answers."""
        from llm_knowledge.encoding.reader import out_of_memory

        out = np.empty((len(ids), self.dim), np.float32)
        if not ids:
            return out
        begun = time.perf_counter()
        if self._engine is not None:
            return self._embed(ids, begun)
        self._check_packing(ids)
        prefix = self._prefix_of(ids)
        shared = len(prefix.tokens) if prefix else 0
        said = [""] * len(ids)
        waiting = list(self._batches(ids, shared))[::-1]
        while waiting:
            rows = waiting.pop()
            batch = [ids[row] for row in rows]
            try:
                if self._answers is not None:
                    out[rows], own = self._answer(batch, prefix)
                    for row, text in zip(rows, own, strict=True):
                        said[row] = text
                else:
                    out[rows] = self._forward(batch, prefix) if prefix else self._forward(batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise InputError(f"out of memory on one text of {len(ids[rows[0]])} tokens; "
                                     f"lower max_tokens") from error  # fmt: skip
                self.batch_tokens = max(1, self.batch_tokens // 2)
                waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
        if answers is not None:
            answers += said
        self._counted(ids, begun, shared)
        return out

    def _counted(self, ids: list[list[int]], begun: float, shared: int) -> None:
        self.counters.tokens += sum(map(len, ids))
        self.counters.reused += shared * len(ids)
        self.counters.seconds += time.perf_counter() - begun

    def _embed(self, ids: list[list[int]], begun: float) -> np.ndarray:
        """As ``_encode_ids``, by the other backend, which makes its own batches."""
        out = self._engine.embed(ids)
        if self.normalize:
            out = unit_length(out)
        self.counters.computed += sum(map(len, ids))
        self._counted(ids, begun, 0)
        return out

    def _prefix_of(self, ids: list[list[int]]) -> SharedPrefix | None:
        """The states of what all these texts begin with, from an earlier call where possible."""
        if not self._share:
            return None
        from llm_knowledge.encoding.prefix import shared_length

        common = shared_length(ids)
        if common < max(PREFIX_TOKENS, PREFIX_SHARE * sum(map(len, ids)) / len(ids)):
            return None
        if self._prefix is not None:
            both = shared_length([[*self._prefix.tokens, -1], [*ids[0][:common], -2]])
            # Texts that happen to agree on a little more do not make a new prefix worth while.
            if both >= 0.8 * common or (both >= PREFIX_TOKENS and len(ids) < PREFIX_TEXTS):
                return self._prefix.cut(both)
        if len(ids) < PREFIX_TEXTS:
            return None
        self._prefix = self._reader.prefix(ids[0][:common])
        self.counters.computed += common
        if self._prefix is None or not (self._share_checked or self._agrees(ids, self._prefix)):
            self._share = False
            return None
        self._share_checked = True
        return self._prefix

    def _agrees(self, ids: list[list[int]], prefix: SharedPrefix) -> bool:
        """Whether this model gives the same vectors with the prefix as without; tried once."""
        two = _middle(ids, len(prefix.tokens) + TRIED_TOKENS)
        try:
            if self._same(self._forward(two), self._forward(two, prefix)):
                return True
        except SHAPE_ERRORS as error:
            _raise_out_of_memory(error)
        warnings.warn(f"{self.name}: its vectors change when the prompts' common beginning is "
                      f"computed once; each prompt is computed whole", stacklevel=2)  # fmt: skip
        return False

    def _check_packing(self, ids: list[list[int]]) -> None:
        """Compare packed with padded vectors once; pad from then on if they differ."""
        if self._packs_checked or self._reader.packing is None:
            return
        self._packs_checked = True
        two, packing = _middle(ids, TRIED_TOKENS), self._reader.packing
        try:
            packed = self._reader.read(two).cpu().numpy()
        except SHAPE_ERRORS as error:  # an attention with a mask, a bias or shapes of its own
            _raise_out_of_memory(error)
            packed = np.zeros((len(two), self.dim), np.float32)
        self._reader.packing = None
        if self._same(self._reader.read(two).cpu().numpy(), packed):
            self._reader.packing = packing
        elif self._must_pack:
            raise InputError("--attention packed: this model has an attention of its own; use auto")

    def _same(self, one: np.ndarray, other: np.ndarray) -> bool:
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        least = 0.99999 if self.dtype_name == "float32" else 0.999
        return bool(((one * other).sum(1) >= least * norms).all() and (norms > 0).all())

    def _batches(self, ids: list[list[int]], shared: int = 0) -> Iterator[list[int]]:
        """Row numbers by computed tokens, longest first: memory runs out at once or never.

        A shared token costs no computation, but its keys and values are read: a quarter of a token.
        """
        batch: list[int] = []
        size = 0
        for row in sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row)):
            width = len(ids[row]) - shared + shared // 4
            if batch and not self._reader.packing:
                width = len(ids[batch[0]]) - shared + shared // 4
            if batch and size + width > self.batch_tokens:
                yield batch
                batch, size, width = [], 0, len(ids[row]) - shared + shared // 4
            batch.append(row)
            size += width
        if batch:
            yield batch

    def _forward(self, ids: list[list[int]], prefix: SharedPrefix | None = None) -> np.ndarray:
        """One batch through the model, behind the prefix if given: float32 [B, D]."""
        self._count_positions(ids, prefix)
        return self._reader.read(ids, prefix).cpu().numpy()

    def _answer(
        self, ids: list[list[int]], prefix: SharedPrefix | None
    ) -> tuple[np.ndarray, list[str]]:
        """As ``_forward``, and what the model says to each text."""
        assert self._answers is not None
        self._count_positions(ids, prefix)
        vectors, said = self._reader.answer(self._answers, ids, prefix, self.state == "answer")
        return vectors.cpu().numpy(), said

    def _count_positions(self, ids: list[list[int]], prefix: SharedPrefix | None) -> None:
        computed, shared = self._reader.positions(ids, prefix), len(prefix.tokens) if prefix else 0
        self.counters.computed += computed
        self.counters.padding += computed - sum(map(len, ids)) + shared * len(ids)


def _raise_out_of_memory(error: Exception) -> None:
    """Raises an error again that says nothing about a way of reading."""
    from llm_knowledge.encoding.reader import out_of_memory

    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error


def _middle(ids: list[list[int]], tokens: int) -> list[list[int]]:
    """Beginnings of two texts of middle length, one shorter, to try a way of reading on."""
    two = sorted(ids, key=len)[len(ids) // 2 :][:2]
    return [own[: tokens - 3 * row] for row, own in enumerate(two)]
