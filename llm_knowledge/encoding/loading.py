"""Loading a frozen model, and refusing options that do not fit it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import torch

# Sentence encoders are trained on short texts; a decoder reads the instruction and the items.
ENCODER_TOKENS, DECODER_TOKENS = 256, 1024


@dataclass
class Loaded:
    """What a model directory holds; ``model`` is None where only the configuration was wanted."""

    tokenizer: Any
    config: Any
    model: Any = None


def load(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    attention: str | None,
    head: bool,
    config_only: bool = False,
) -> Loaded:
    """Load a model from a directory, safetensors only.

    Args:
        path: the model directory.
        dtype: of the weights.
        device: where they go.
        trust_remote_code: run Python that comes with the model.
        attention: implementation by its name in transformers; None is their default.
        head: with the language-model head.
        config_only: no weights; another backend loads them.

    Raises:
        InputError: the model or its tokenizer cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # AutoModel drops the language-model head; the report of it says nothing new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    how = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    kind = AutoModelForCausalLM if head else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        if config_only:
            return Loaded(tokenizer, AutoConfig.from_pretrained(path, **how))
        model = kind.from_pretrained(path, dtype=dtype, use_safetensors=True,
                                     attn_implementation=attention, **how)  # fmt: skip
    except Exception as error:  # any of a dozen kinds: what the directory holds is user input
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: the model cannot be loaded: {text[0]}") from error
    model.config.use_cache = False
    model.to(device).eval().requires_grad_(False)
    return Loaded(tokenizer, model.config, model)


def check_layer(config: Any, layer: int) -> int:
    """The layer whose hidden state is wanted, -1 for the final one; InputError if there is none."""
    layers = int(getattr(config, "num_hidden_layers", 0))
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"layer: {layer} is outside -{layers + 1}..{layers} of this model")
    return -1 if layer == layers else layer


def token_limit(loaded: Loaded, asked: int | None, kind: str, answer_tokens: int) -> int:
    """Most tokens of a text: as asked, or by the kind of model; InputError if it has less room."""
    room = min(
        int(getattr(loaded.config, "max_position_embeddings", None) or 1 << 30),
        int(loaded.tokenizer.model_max_length or 1 << 30),
    )
    hard = room - answer_tokens
    if asked is not None and not 8 <= asked <= hard:
        raise InputError(f"max_tokens: {asked} is outside 8..{hard} of this model")
    if hard < 8:
        raise InputError(f"answer_tokens: {answer_tokens} leaves no room for a prompt in the {room} "
                         f"tokens of this model")  # fmt: skip
    return asked or min(hard, ENCODER_TOKENS if kind == "encoder" else DECODER_TOKENS)


def refuse_answers(tokens: int, state: str, kind: str, pooling: str) -> None:
    """Refuse options of generated answers that do not go together.

    Raises:
        InputError: one of them contradicts the model or another option.
    """
    if tokens < 0:
        raise InputError(f"--answer-tokens: {tokens} is negative")
    if state == "answer" and not tokens:
        raise InputError("--state answer: there is no answer without --answer-tokens")
    if tokens and kind != "decoder":
        raise InputError("--answer-tokens: only a decoder writes an answer")
    if state == "answer" and pooling != "last":
        raise InputError("--state answer: is the state of one step; use --pooling last")


def find_device(asked: str | None) -> torch.device:
    """The asked device, else this worker's accelerator, else the CPU.

    Raises:
        InputError: the asked device cannot be used.
    """
    import torch

    if asked is None:
        count = torch.cuda.device_count()
        asked = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {asked!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device
