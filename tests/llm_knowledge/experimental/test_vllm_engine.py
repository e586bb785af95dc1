"""The adapter to vLLM against a stand-in with its documented interface: vLLM itself is not run here."""

import dataclasses
import os
import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.store.reader import KnowledgeStore, verify
from tests.helpers.knowledge_data import random_dataset, tiny_decoder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("qwen"))


@dataclasses.dataclass
class OldPooler:
    pooling_type: str | None = None
    normalize: bool | None = None


@dataclasses.dataclass
class MiddlePooler:
    """Of versions with two settings that scale, either of which is on where it is left out."""

    pooling_type: str | None = None
    normalize: bool | None = True
    use_activation: bool | None = True
    softmax: bool | None = True


@dataclasses.dataclass
class NewPooler:
    seq_pooling_type: str | None = None
    use_activation: bool | None = None


class LLM:
    """Answers as vLLM's `LLM.embed` does, by the other backend."""

    made: ClassVar[list] = []

    def __init__(
        self,
        model,
        runner,
        convert,
        dtype,
        max_model_len,
        pooler_config,
        enable_prefix_caching,
        trust_remote_code,
    ):
        self.options = {
            "runner": runner,
            "convert": convert,
            "dtype": dtype,
            "pool": pooler_config,
            "length": max_model_len,
            "prefix": enable_prefix_caching,
        }
        LLM.made.append(self)
        self.encoder = Encoder(model, device="cpu", dtype="float32", normalize=False)

    def embed(self, prompts, use_tqdm):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        return [
            types.SimpleNamespace(outputs=types.SimpleNamespace(embedding=row.tolist()))
            for row in self.encoder._encode_ids(ids)
        ]


def install(monkeypatch, pooler):
    vllm, config = types.ModuleType("vllm"), types.ModuleType("vllm.config")
    vllm.LLM, config.PoolerConfig, vllm.config = LLM, pooler, config
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    LLM.made.clear()


@pytest.mark.parametrize("pooler", [OldPooler, MiddlePooler, NewPooler])
def test_the_same_store_comes_out(qwen, tmp_path, monkeypatch, pooler):
    install(monkeypatch, pooler)
    data = random_dataset(tmp_path / "data", users=30)
    common = {"data": data, "model": str(qwen), "progress": False, "dtype": "float32"}
    one = extract(ExtractConfig(out=tmp_path / "one", backend="vllm", **common))
    two = extract(ExtractConfig(out=tmp_path / "two", device="cpu", **common))
    verify(one)
    a, b = KnowledgeStore.open(one), KnowledgeStore.open(two)
    assert a.manifest.job == b.manifest.job  # either continues what the other began
    np.testing.assert_array_equal(a.keys(), b.keys())
    assert a.read_text(range(30)) == b.read_text(range(30))
    np.testing.assert_allclose(a.read_vectors(0, 30), b.read_vectors(0, 30), atol=2e-3)
    assert LLM.made[0].options == {
        "runner": "pooling",
        "convert": "embed",
        "dtype": "float32",
        "length": 512,
        "prefix": True,
        "pool": pooler("LAST", *[False] * (len(dataclasses.fields(pooler)) - 1)),
    }
    scaled = Encoder(qwen, backend="vllm", normalize=True, pooling="mean")
    assert (scaled.dtype_name, LLM.made[-1].options["prefix"]) == ("bfloat16", False)
    np.testing.assert_allclose(np.linalg.norm(scaled.encode(["a b", "c"]), axis=1), 1, atol=1e-6)


def test_every_worker_has_an_accelerator_of_its_own(qwen, monkeypatch):
    install(monkeypatch, OldPooler)
    for place, seen, own in (("2", None, "2"), ("1", "4,6", "6"), ("3", "4,6", "6")):
        monkeypatch.setenv("LOCAL_RANK", place)
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        Encoder(qwen, backend="vllm")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_what_vllm_cannot_do_is_refused(qwen, monkeypatch):
    for options in ({"layer": 1}, {"answer_tokens": 2}):
        with pytest.raises(InputError, match="use --backend transformers"):
            Encoder(qwen, backend="vllm", **options)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vLLM 0\.11 or later cannot be imported"):
        Encoder(qwen, backend="vllm")
    install(monkeypatch, OldPooler)
    monkeypatch.setattr(
        LLM, "__init__", lambda self, **how: (_ for _ in ()).throw(ValueError("odd"))
    )
    with pytest.raises(InputError, match="vLLM cannot run this model: odd"):
        Encoder(qwen, backend="vllm")
