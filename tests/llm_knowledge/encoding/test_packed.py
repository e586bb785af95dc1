import numpy as np
import pytest
import torch

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.encoding.packed import supports_packing
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import tiny_decoder, tiny_encoder, tiny_tokenizer

TEXTS = ["You know all about taste. " + "x, yz; " * (row % 5) + f"so {row}:" for row in range(13)]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny random models, by name; `test_architectures` has those of many families."""
    import transformers

    make = {
        "qwen": None,
        "bert": None,
        "mistral_window": (
            "Mistral",
            "ForCausalLM",
            {"num_key_value_heads": 2, "sliding_window": 9},
        ),
        "roberta": ("Roberta", "Model", {}),
    }
    paths = {}
    for name, how in make.items():
        path = paths[name] = tmp_path_factory.mktemp(name)
        if how is None:
            (tiny_decoder if name == "qwen" else tiny_encoder)(path)
            continue
        family, suffix, more = how
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SMALL, **more)
        getattr(transformers, f"{family}{suffix}")(config).save_pretrained(path)
        tiny_tokenizer(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "bert"])
@pytest.mark.parametrize(("pooling", "layer"), [("last", -1), ("mean", -1), ("last", 1)])
def test_packed_equals_padded(models, family, pooling, layer):
    options = {"pooling": pooling, "layer": layer, "device": "cpu", "batch_tokens": 200}
    padded = Encoder(models[family], attention="sdpa", prefix_reuse="off", **options)
    packed = Encoder(models[family], **options)
    assert packed._batched.reader.packing is not None
    np.testing.assert_allclose(packed.encode(TEXTS), padded.encode(TEXTS), atol=1e-5, rtol=0)
    assert packed._batched.reader.packing is not None
    counted = packed.counters
    assert counted.padding == 0
    again = counted.computed
    packed.encode(TEXTS)  # nothing is tried out any more
    assert counted.computed - again == (counted.tokens - counted.reused) // 2
    assert (counted.reused > 0) == (family != "bert")


def test_what_packing_would_change_is_padded(models):
    for family in ("roberta", "mistral_window"):
        packed, padded = (
            Encoder(models[family], device="cpu", attention=name) for name in ("auto", "sdpa")
        )
        np.testing.assert_array_equal(packed.encode(TEXTS), padded.encode(TEXTS))
        assert packed._batched.reader.packing is None
    with pytest.raises(InputError, match="attention of its own"):
        Encoder(models["mistral_window"], device="cpu", attention="packed")


def test_only_last_tokens_go_through_the_last_layer(models):
    encoder = Encoder(models["qwen"], device="cpu", prefix_reuse="off", batch_tokens=1 << 16)
    encoder.encode(TEXTS)
    rows: dict[int, list[int]] = {0: [], 1: []}
    for number, layer in enumerate(encoder.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, inputs, out, own=rows[number]: own.append(inputs[0].shape[1])
        )
    encoder.encode(TEXTS)
    assert rows == {0: [sum(encoder.count_tokens(TEXTS))], 1: [len(TEXTS)]}


def test_the_model_itself_stays_as_it_was(models):
    encoder = Encoder(models["qwen"], device="cpu")
    assert supports_packing(encoder.model, causal=True)
    ids = torch.tensor([encoder.tokenizer(TEXTS[3])["input_ids"]])
    with torch.no_grad():
        before = encoder.model(input_ids=ids).last_hidden_state
        found = encoder.encode(TEXTS)
        after = encoder.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    np.testing.assert_allclose(found[3], after[0, -1].numpy(), atol=1e-5)


@pytest.mark.slow
def test_compiled_batches_are_padded(models):
    with pytest.raises(InputError, match="packed batches cannot be compiled"):
        Encoder(models["qwen"], device="cpu", attention="packed", compilation="default")
    encoder = Encoder(models["qwen"], device="cpu", compilation="default")
    assert encoder._batched.reader.packing is None
    assert encoder.model._compiled_call_impl is not None
