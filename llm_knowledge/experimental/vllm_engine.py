"""vLLM's pooling runner as the model behind ``Encoder``: token ids in, pooled vectors out.

Written against the documented interface of vLLM 0.11 and later (``LLM(runner="pooling")``,
``PoolerConfig``, ``LLM.embed``). Not measured, and tested only against a stand-in for that interface.
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
        """Start the engine.

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
            raise InputError(f"--backend vllm: vLLM 0.11 or later cannot be imported ({error}); install "
                             f"it, or take --backend transformers") from error  # fmt: skip
        known = {field.name for field in dataclasses.fields(PoolerConfig)}
        # Two settings were renamed between versions. Vectors come as they are: the caller scales.
        how = {"seq_pooling_type" if "seq_pooling_type" in known else "pooling_type": pooling.upper(),
               "use_activation" if "use_activation" in known else "normalize": False}  # fmt: skip
        try:
            self._llm: Any = vllm.LLM(
                model=str(path), runner="pooling", convert="embed" if causal else "auto", dtype=dtype,
                max_model_len=max_tokens, pooler_config=PoolerConfig(**how),
                enable_prefix_caching=reuse and causal and pooling == "last",
                trust_remote_code=trust_remote_code)  # fmt: skip
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(f"{path}: vLLM cannot run this model: {str(error).splitlines()[0]}") \
                from error  # fmt: skip

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors of tokenised texts, float32 [B, D], in their order. vLLM makes the batches."""
        said = self._llm.embed([{"prompt_token_ids": own} for own in ids], use_tqdm=False)
        return np.array([one.outputs.embedding for one in said], np.float32)


def _own_accelerator() -> None:
    """Leave this worker one accelerator: vLLM takes the first that it sees."""
    place = os.environ.get("LOCAL_RANK")
    if place is None:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(int(place) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(place) % len(devices)]
