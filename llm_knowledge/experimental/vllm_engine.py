"""vLLM's pooling runner as the model behind `Encoder`: token ids in, pooled vectors out.

Written against the documented interface of vLLM 0.11 and later (`LLM(runner="pooling")`,
`PoolerConfig`, `LLM.embed`). Not measured, and tested only against a stand-in for that interface.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from llm_knowledge.errors import InputError


class VllmEngine:
    """One vLLM engine on this worker's accelerator."""

    def __init__(
        self,
        path: Path,
        pooling: str,
        causal: bool,
        dtype: str,
        max_tokens: int,
        reuse: bool,
        trust_remote_code: bool,
    ) -> None:
        """Starts the engine.

        Args:
            path: model directory with safetensors.
            pooling: "last", "mean" or "cls".
            causal: whether the model is a decoder, which vLLM converts to an embedding model.
            dtype: "float32" or "bfloat16".
            max_tokens: longest text.
            reuse: keep keys and values of common beginnings, in blocks of vLLM's size.
            trust_remote_code: run Python that comes with the model.

        Raises:
            InputError: vLLM is not installed, or cannot run this model.
        """
        _own_accelerator()
        try:
            import vllm
            from vllm.config import PoolerConfig
        except ImportError as error:
            raise InputError(
                f"--backend vllm: vLLM 0.11 or later cannot be imported ({error}); install "
                f"it, or take --backend transformers"
            ) from error
        try:
            self._llm: Any = vllm.LLM(
                model=str(path),
                runner="pooling",
                convert="embed" if causal else "auto",
                dtype=dtype,
                max_model_len=max_tokens,
                pooler_config=PoolerConfig(**pooler_settings(PoolerConfig, pooling)),
                enable_prefix_caching=reuse and causal and pooling == "last",
                trust_remote_code=trust_remote_code,
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"{path}: vLLM cannot run this model: {str(error).splitlines()[0]}"
            ) from error

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors of tokenised texts, float32 [B, D], in their order. vLLM makes the batches."""
        outputs = self._llm.embed([{"prompt_token_ids": text} for text in ids], use_tqdm=False)
        return np.array([answer.outputs.embedding for answer in outputs], np.float32)


def pooler_settings(pooler_config: Any, pooling: str) -> dict[str, Any]:
    """Settings of vLLM's `PoolerConfig` for vectors as the model gives them; the caller scales.

    Their names changed between versions, and some versions have two that both scale. All that a
    version knows are set: those left out would be the model's or the version's own choice.

    Args:
        pooler_config: the dataclass of the installed version.
        pooling: "last", "mean" or "cls".
    """
    known = {field.name for field in dataclasses.fields(pooler_config)}
    kind = "seq_pooling_type" if "seq_pooling_type" in known else "pooling_type"
    scaling = {name: False for name in ("normalize", "use_activation", "activation", "softmax")}
    return {kind: pooling.upper(), **{name: no for name, no in scaling.items() if name in known}}


def _own_accelerator() -> None:
    """Leaves this worker one accelerator: vLLM takes the first that it sees."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(int(rank) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(rank) % len(devices)]
