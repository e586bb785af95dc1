"""What a sentence-transformers directory says about its vectors: how to pool, whether to scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_knowledge.encoding.model_files import read_json
from llm_knowledge.errors import InputError

TokenPooling = Literal["mean", "cls", "last"]
# Names in `1_Pooling/config.json`, the older ones behind `pooling_mode_`, of what we have, too.
_KINDS: dict[str, TokenPooling] = {
    "cls_token": "cls",
    "cls": "cls",
    "mean_tokens": "mean",
    "mean": "mean",
    "lasttoken": "last",
}


@dataclass(frozen=True)
class SentenceModules:
    """The modules behind the transformer of a sentence-transformers model.

    Attributes:
        pooling: how tokens become one vector; None where no module says so.
        normalize: whether vectors are scaled to length 1.
        unserved: what is done beside, which we do not have; empty where nothing is.
    """

    pooling: TokenPooling | None
    normalize: bool
    unserved: str = ""


def read_sentence_modules(path: Path) -> SentenceModules | None:
    """Reads `modules.json` of a model directory; None where there is none.

    Raises:
        InputError: it, or the configuration of its pooling, cannot be read.
    """
    if not (path / "modules.json").exists():
        return None
    modules: Any = read_json(path / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{path / 'modules.json'}: is no list of modules")
    pooling: TokenPooling | None = None
    normalize, unserved = False, []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        folder = str(module.get("path", ""))
        if kind == "Pooling":
            modes = _modes(read_json(path / folder / "config.json"))
            pooling = _KINDS.get(modes[0]) if len(modes) == 1 else None
            unserved += [] if pooling else [f"pooling by {' and '.join(modes) or 'nothing'}"]
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):  # nothing is dropped where nothing is trained
            unserved.append(f"a module {kind} ({folder})")
    return SentenceModules(pooling, normalize, " and ".join(unserved))


def _modes(config: dict[str, Any]) -> list[str]:
    """Kinds of pooling whose vectors are put side by side."""
    named = config.get("pooling_mode")
    if named is not None:
        return [str(mode) for mode in (named if isinstance(named, list) else [named])]
    start = "pooling_mode_"
    return [
        name.removeprefix(start) for name, on in config.items() if name.startswith(start) and on
    ]


def default_pooling(
    path: Path, kind: Literal["encoder", "decoder"], modules: SentenceModules | None
) -> Literal["mean", "paragraphs", "last", "cls"]:
    """How texts are pooled where nobody says: as the directory has it, else by the kind of model.

    The mean of an encoder is that of every paragraph, then over them.

    Raises:
        InputError: the directory asks for what we do not have.
    """
    if modules and modules.unserved:
        raise InputError(
            f"{path}: its sentence-transformers modules ask for {modules.unserved}, which is not "
            f"served; name --pooling mean, cls or last to take the hidden states without it"
        )
    pooling = modules.pooling if modules else None
    if pooling is None:
        return "last" if kind == "decoder" else "paragraphs"
    return "paragraphs" if pooling == "mean" and kind == "encoder" else pooling
