"""A frozen Hugging Face model as a function from texts to pooled vectors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_knowledge.encoding.counters import Counters as Counters
from llm_knowledge.encoding.loading import (
    ALL_DEVICES,
    check_layer,
    find_device,
    load,
    refuse_answers,
    text_model,
    token_limit,
)
from llm_knowledge.encoding.model_files import default_model_path as default_model_path
from llm_knowledge.encoding.model_files import find_model, model_kind, read_json, weights_hash
from llm_knowledge.encoding.options import EncoderOptions
from llm_knowledge.encoding.rotations import length_rule
from llm_knowledge.encoding.sentence_modules import default_pooling, read_sentence_modules
from llm_knowledge.encoding.tokens import Tokens, ahead, split_paragraphs
from llm_knowledge.errors import InputError
from llm_knowledge.vectors import join_parts, unit_length

# The states of 2048 tokens stay near a CPU's cache; an accelerator wants more in flight.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 65_536
# Texts that are sorted by length together; the next ones are tokenised meanwhile.
BLOCK_TEXTS = 1024


class Encoder:
    """A frozen model, its tokenizer and how hidden states become one vector per text.

    Args:
        model: Directory, or name on the hub; None is the packaged MiniLM sentence encoder.
        options: Further fields of `EncoderOptions`.

    Attributes:
        name, revision, weights_hash: which model, for the manifest.
        kind: "encoder" or "decoder".
        pooling: "mean" over the real tokens; "paragraphs": of each paragraph, read as a text of its
            own, then over them; the "last" real token; or "cls", the first.
        max_tokens: longer texts are truncated at the end; prompts are built to fit.
        dim: length of a vector.
        normalize: whether vectors are scaled to length 1.
        chat_hash: hash of the chat template around every text, None without one.
        counters: texts, tokens, padding and reuse so far.

    Raises:
        InputError: the model cannot be found or loaded, or an option does not fit it.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        asked = EncoderOptions(model=None if model is None else str(model), **options)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path, self.name, self.revision = find_model(asked.model, asked.revision)
        self.weights_hash = weights_hash(self.path)
        self.kind = model_kind(read_json(self.path / "config.json"))
        self.answer_tokens, self.state = asked.answer_tokens, asked.state
        modules = read_sentence_modules(self.path)
        self.pooling = asked.pooling
        if asked.pooling == "auto":
            self.pooling = default_pooling(self.path, self.kind, modules)
        scales = modules.normalize if modules else self.kind == "encoder"
        self.normalize = scales if asked.normalize is None else asked.normalize
        self._uses_vllm = asked.backend == "vllm"
        self._refuse_contradictions(asked)
        self.device = find_device("cpu" if self._uses_vllm else asked.device)
        on_cpu = self.device.type == "cpu" and not self._uses_vllm
        usual = "float32" if on_cpu else "bfloat16"
        self.dtype_name = usual if asked.dtype == "auto" else asked.dtype
        self.counters = Counters()
        loaded = self._load(asked)
        self.layer = check_layer(loaded.config, asked.layer)
        self.max_tokens = token_limit(loaded, asked.max_tokens, self.kind, self.answer_tokens)
        # Sentence models were trained on plain texts, whatever template their tokenizers inherited.
        chat = self.kind == "decoder" and asked.chat_template == "auto" and modules is None
        self._tokens = Tokens(self.tokenizer, self.max_tokens, chat, answers=self.answer_tokens > 0)
        self.chat_hash = self._tokens.chat_hash
        self._engine: Any = None
        self.model: Any = None
        if self._uses_vllm:
            self.dim = int(self.config.hidden_size)
            self._engine = self._start_vllm(asked)
        else:
            batch_tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
            self._batched = self._make_reader(
                loaded.model, asked, asked.batch_tokens or batch_tokens
            )
            self.dim = self._batched.reader.dim

    def _refuse_contradictions(self, asked: EncoderOptions) -> None:
        if asked.compilation != "off" and asked.attention == "packed":
            raise InputError("--compile: packed batches cannot be compiled; use --attention sdpa")
        if self.pooling == "paragraphs" and self.kind == "decoder":
            raise InputError(
                "--pooling paragraphs: parts a prompt from its instruction; it is for "
                "encoders, use last or mean"
            )
        if self.pooling == "cls" and self.kind == "decoder":
            raise InputError(
                "--pooling cls: a decoder's first token sees no other; use last or mean"
            )
        if self._uses_vllm and (self.answer_tokens or asked.layer != -1):
            raise InputError(
                "--backend vllm: gives the final layer of the prompt, and no answer; use "
                "--backend transformers"
            )
        plain = asked.attention != "packed" and asked.compilation == "off"
        if asked.device == ALL_DEVICES and (self._uses_vllm or self.answer_tokens or not plain):
            raise InputError(
                "--device all: a divided model is read padded, without answers, by transformers; leave "
                "out --backend, --answer-tokens, --compile and --attention packed"
            )
        refuse_answers(self.answer_tokens, self.state, self.kind, self.pooling)

    def _load(self, asked: EncoderOptions) -> Any:
        """Loads tokenizer, configuration and, but for vLLM, the model."""
        import torch

        loaded = load(
            self.path,
            getattr(torch, self.dtype_name),
            self.device,
            asked.trust_remote_code,
            None if asked.attention in ("auto", "packed") else asked.attention,
            self.answer_tokens > 0,
            config_only=self._uses_vllm,
            divided=asked.device == ALL_DEVICES,
        )
        self.tokenizer, self.config = loaded.tokenizer, loaded.config
        return loaded

    @property
    def _piece_pooling(self) -> str:
        """How one piece of a text is pooled: texts are read in pieces where paragraphs count."""
        return "mean" if self.pooling == "paragraphs" else self.pooling

    def _start_vllm(self, asked: EncoderOptions) -> Any:
        from llm_knowledge.experimental.vllm_engine import VllmEngine

        rule = length_rule(self.config)
        if not rule.is_short(self.max_tokens):
            raise InputError(
                f"--backend vllm: gives all texts the rotary frequencies of the longest; lower "
                f"--max-tokens to {rule.first}, or use --backend transformers"
            )
        return VllmEngine(
            self.path,
            self._piece_pooling,
            self.kind == "decoder",
            self.dtype_name,
            self.max_tokens,
            asked.prefix_reuse == "auto",
            asked.trust_remote_code,
        )

    def _make_reader(self, loaded: Any, asked: EncoderOptions, batch_tokens: int) -> Any:
        """What reads token ids, batch by batch, with answers where they are wanted."""
        from llm_knowledge.encoding.batched import BatchedReader, ReadingPlan
        from llm_knowledge.encoding.reader import Reader

        answers = None
        if self.answer_tokens:
            from llm_knowledge.encoding.answers import Answers

            answers = Answers(loaded, self.answer_tokens, self.tokenizer)
        self.model = answers.model if answers else text_model(loaded)
        packs = asked.attention in ("auto", "packed")
        compiles = asked.compilation != "off"
        pads = compiles or (answers is not None and packs)
        reader = Reader(
            self.model,
            self.kind == "decoder",
            self._piece_pooling,
            self.layer,
            self.normalize,
            "sdpa" if pads else asked.attention,
        )
        if compiles:
            self.model.compile(mode=asked.compilation, dynamic=True)
        plan = ReadingPlan(
            self.name,
            self.dtype_name,
            # Of a divided model, keys and values are on several devices.
            asked.prefix_reuse == "auto" and asked.device != ALL_DEVICES,
            asked.attention == "packed",
            self.state == "answer",
        )
        return BatchedReader(reader, answers, plan, batch_tokens, self.counters)

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
        return self.encode_blocks(texts[start : start + BLOCK_TEXTS] for start in starts)

    def encode_blocks(self, blocks: Iterable[Sequence[str]]) -> np.ndarray:
        """As `encode`, for texts that come in blocks: float32 [texts of all blocks, dim]."""
        return self.read(blocks)[0]

    def read(self, blocks: Iterable[Sequence[str]]) -> tuple[np.ndarray, list[str] | None]:
        """Vectors of texts that come in blocks, and answers where they are wanted.

        The next block is made (`blocks` is advanced) and tokenised in a background thread while
        the model reads one.

        Returns:
            float32 [texts of all blocks, dim], and as many answers, or None.
        """
        answers: list[str] | None = [] if self.answer_tokens else None
        read, row = [np.empty((0, self.dim), np.float32)], 0
        for texts, parts, ids in ahead(map(self._prepare, blocks)):
            for number, tokens in zip(np.repeat(np.arange(len(texts)), parts), ids, strict=True):
                if not tokens:
                    start = texts[int(number)][:60]
                    raise InputError(f"text {row + number} has no token: {start!r}")
            vectors = join_parts(self._encode_ids(ids, answers), parts, self.normalize)
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if bad.size:
                raise InputError(
                    f"text {row + bad[0]}: the model returned NaN or Inf in "
                    f"{self.dtype_name}; try --dtype float32"
                )
            read.append(vectors)
            self.counters.texts += len(texts)
            row += len(texts)
        return read[1] if len(read) == 2 else np.concatenate(read), answers

    def _prepare(self, texts: Sequence[str]) -> tuple[Sequence[str], np.ndarray, list[list[int]]]:
        """Texts, into how many pieces each is divided [texts], token ids of all pieces."""
        if self.pooling != "paragraphs":
            return texts, np.ones(len(texts), int), self._tokenize(texts, truncate=True)
        pieces, parts = split_paragraphs(texts)
        return texts, parts, self._tokenize(pieces, truncate=True)

    def _encode_ids(self, ids: list[list[int]], answers: list[str] | None = None) -> np.ndarray:
        """Vectors of tokenised texts, float32 [len(ids), dim]; appends answers."""
        if self._engine is None:
            return self._batched.read(ids, answers)
        if not ids:
            return np.empty((0, self.dim), np.float32)
        begun, tokens = time.perf_counter(), sum(map(len, ids))
        vectors = self._engine.embed(ids)
        self.counters.tokens += tokens
        self.counters.computed += tokens
        self.counters.seconds += time.perf_counter() - begun
        return unit_length(vectors) if self.normalize else vectors
