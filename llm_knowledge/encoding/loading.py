"""Loading a frozen model, and refusing options that do not fit it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.encoding.model_files import is_half_of_both
from llm_knowledge.encoding.rotations import growth
from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import torch

# What `--device` says for a model that is divided over all accelerators.
ALL_DEVICES = "all"
# Sentence encoders are trained on short texts; a decoder reads the instruction and the items.
ENCODER_TOKENS, DECODER_TOKENS = 256, 1024

# Masks and positions that older versions of transformers saved beside the weights.
_OLD_BUFFERS = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids|(attn|attention)\.bias)$")


@dataclass
class Loaded:
    """What a model directory holds; `model` is None where only the configuration was wanted."""

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
    divided: bool = False,
) -> Loaded:
    """Loads a model from a directory, safetensors only.

    Args:
        path: the model directory.
        dtype: of the weights.
        device: where they go.
        trust_remote_code: run Python that comes with the model.
        attention: implementation by its name in transformers; None is their default.
        head: with the language-model head.
        config_only: no weights; another backend loads them.
        divided: over all accelerators, the first layers on the first one; not on `device` alone.

    Returns:
        Tokenizer, configuration (of a model that also reads images or sound, of its text) and model.

    Raises:
        InputError: the model or its tokenizer cannot be loaded, or the weights are another model's.
    """
    from transformers import AutoConfig, AutoTokenizer

    allowed: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with _without_load_reports():
            tokenizer = AutoTokenizer.from_pretrained(path, **allowed)
            config = AutoConfig.from_pretrained(path, **allowed)
            text_config = config.get_text_config()  # raises where a model has several
            if config_only:
                return Loaded(tokenizer, text_config)
            device_map = _device_map(config, device, divided)
            model, report = _model_class(config, head).from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `refuse_other_weights` names them
                device_map=device_map,
                **allowed,
            )
        if device_map is None:
            model.to(device)
    except Exception as error:  # any of a dozen kinds: what the directory holds is user input
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: the model cannot be loaded: {text[0]}") from error
    refuse_other_weights(path, model, report)
    _refuse_left_over(path, model)
    model.eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    text_config.use_cache = False
    return Loaded(tokenizer, text_config, model)


def _device_map(config: Any, device: torch.device, divided: bool) -> Any:
    """Where transformers puts a model while it loads; None: nowhere in particular, it is moved then."""
    if divided:
        return "auto"
    # What is quantised cannot be moved afterwards: it is loaded where it is to stay.
    return {"": device} if getattr(config, "quantization_config", None) is not None else None


def _refuse_left_over(path: Path, model: Any) -> None:
    """Refuses a divided model of which parts fit on no accelerator: they would be copied every time.

    Raises:
        InputError: parts of the model are in the main memory or on a disk.
    """
    parts = getattr(model, "hf_device_map", None) or {}
    left = [name for name, where in parts.items() if where in ("cpu", "disk")]
    if left and len(parts) > 1:
        raise InputError(
            f"{path}: the model is larger than the accelerators: {len(left)} of its {len(parts)} "
            f"parts do not fit, such as {left[0]}; take more of them, or --device cpu"
        )


@contextmanager
def _without_load_reports() -> Iterator[None]:
    """Keeps transformers from reporting on a load, which `refuse_other_weights` judges.

    Its settings are those of the whole process: they are put back.
    """
    from transformers.utils import logging

    verbosity, progress_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bars:
            logging.enable_progress_bar()


def _model_class(config: Any, head: bool) -> Any:
    """The class of transformers that loads a configuration, with a language-model head or not."""
    import transformers

    if not head:
        half = is_half_of_both(config.to_dict())
        return transformers.AutoModelForTextEncoding if half else transformers.AutoModel
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def text_model(model: Any) -> Any:
    """The part of a model that reads text: all of it, unless the model reads images or sound too."""
    from transformers import PreTrainedModel

    text_config = model.config.get_text_config()
    if text_config is model.config:
        return model
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.config is text_config), model)


def refuse_other_weights(path: Path, model: Any, report: dict[str, Any]) -> None:
    """Refuses weights that are fewer or more than those that the configuration asks for.

    Heads that are not read do not matter: a pooler may be missing, and what stands outside of the
    body (the head of a masked or causal language model, a classifier, a tower for images) may be
    left over or missing. Tied weights are not missing.

    Args:
        path: the model directory, for the message.
        model: as loaded.
        report: `output_loading_info` of transformers: missing, unexpected and mismatched names.

    Raises:
        InputError: a tensor that is read is missing, left over, or of another shape.
    """
    text, head = text_model(model), model.get_output_embeddings()
    modules = {id(part) for body in (text, head) if body is not None for part in body.modules()}
    read = {name for name, part in model.named_modules() if id(part) in modules}
    prefix = next(name for name, part in model.named_modules() if part is text)
    prefix += "." if prefix else ""
    children = {name for name, _ in text.named_children()} - {"pooler"}

    def is_read(name: str) -> bool:
        return name.rpartition(".")[0] in read and "pooler" not in name.split(".")

    def is_of_body(name: str) -> bool:
        names = {name, name.removeprefix(f"{model.base_model_prefix}.")}
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        return any(name.partition(".")[0] in children for name in inside)

    faults = {
        "not among its weights": [name for name in report["missing_keys"] if is_read(name)],
        "left over": [
            name
            for name in report["unexpected_keys"]
            if is_of_body(name) and not _OLD_BUFFERS.search(name)
        ],
        "of another shape": [
            f"{name} ({list(stored)}, not {list(asked)})"
            for name, stored, asked in report["mismatched_keys"]
            if is_read(name)
        ],
    }
    faults = {fault: names for fault, names in faults.items() if names}
    if faults:
        listed = "; ".join(
            f"{len(names)} tensors {fault}, such as {min(names)}" for fault, names in faults.items()
        )
        raise InputError(
            f"{path}: config.json describes another model than the weights: {listed}; "
            f"download both anew"
        )


def check_layer(config: Any, layer: int) -> int:
    """The layer whose hidden state is asked for, -1 for the final one.

    Raises:
        InputError: the model has no such layer.
    """
    layers = int(getattr(config, "num_hidden_layers", 0))
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"layer: {layer} is outside -{layers + 1}..{layers} of this model")
    return -1 if layer == layers else layer


def token_limit(loaded: Loaded, asked: int | None, kind: str, answer_tokens: int) -> int:
    """Most tokens of a text: as asked, or by the kind of model.

    Positions of dynamic scaling reach further than the length of pretraining, which is the default.

    Raises:
        InputError: the model has less room.
    """
    positions = int(getattr(loaded.config, "max_position_embeddings", None) or 0)
    positions = positions if positions > 0 else 1 << 30  # XLNet says -1: as many as one likes
    reach = int(positions * growth(loaded.config))
    others = min(
        int(loaded.tokenizer.model_max_length or 1 << 30), _learned_positions(loaded.model)
    )
    hard = min(reach, others) - answer_tokens
    if asked is not None and not 8 <= asked <= hard:
        raise InputError(f"max_tokens: {asked} is outside 8..{hard} of this model")
    usual = min(positions, others) - answer_tokens
    if usual < 8:
        raise InputError(
            f"answer_tokens: {answer_tokens} leaves no room for a prompt in the "
            f"{usual + answer_tokens} tokens of this model"
        )
    return asked or min(usual, ENCODER_TOKENS if kind == "encoder" else DECODER_TOKENS)


def _learned_positions(model: Any) -> int:
    """Positions of tokens that a model has vectors for, where RoBERTa's kind begins behind padding.

    Their tables of positions have a row for padding; the first token is given the one behind it:
    514 rows are room for 512 tokens.
    """
    import torch

    tables = [
        part
        for name, part in (model.named_modules() if model is not None else ())
        if name.endswith("position_embeddings")
        and isinstance(part, torch.nn.Embedding)
        and part.padding_idx is not None
    ]
    return min(
        (table.num_embeddings - int(table.padding_idx or 0) - 1 for table in tables),
        default=1 << 30,
    )


def refuse_answers(tokens: int, state: str, kind: str, pooling: str) -> None:
    """Refuses options of generated answers that do not go together.

    Raises:
        InputError: one of them contradicts the model or another option.
    """
    if state == "answer" and not tokens:
        raise InputError("--state answer: there is no answer without --answer-tokens")
    if tokens and kind != "decoder":
        raise InputError("--answer-tokens: only a decoder writes an answer")
    if state == "answer" and pooling != "last":
        raise InputError("--state answer: is the state of one step; use --pooling last")


def find_device(asked: str | None) -> torch.device:
    """The asked device, else this worker's accelerator, else the CPU.

    Of `ALL_DEVICES`, it is the first one: texts go there.

    Raises:
        InputError: the asked device cannot be used, or not by several workers.
    """
    import torch

    count = torch.cuda.device_count()
    if asked == ALL_DEVICES:
        if not count:
            raise InputError("--device all: this machine has no accelerator; use cpu")
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise InputError("--device all: one worker takes all accelerators; start a single one")
        asked = "cuda:0"
    if asked is None:
        asked = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).cpu()  # nothing comes back from the device "meta"
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {asked!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device
