"""A text's vector is the same whatever it is read with, also where frequencies depend on the batch."""

import copy

import numpy as np
import pytest
import torch
import transformers

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.encoding.rotations import LengthRule, length_rule
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import tiny_tokenizer

START = "You know all about taste. "  # a character is a token
LENGTHS = (27, 33, 39, 40, 41, 47, 64, 64, 100, 158, 160)
TEXTS = [START + f"{row:x}" * (length - len(START)) for row, length in enumerate(LENGTHS)]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 127,
}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * place for place in range(8)]}
LONGROPE = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 40}
MODELS = {
    "phi3": (
        "Phi3",
        {
            "max_position_embeddings": 160,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 40,
        },
    ),
    "llama_dynamic": (
        "Llama",
        {
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    paths = {}
    for name, (family, more) in MODELS.items():
        paths[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **more)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(paths[name])
        tiny_tokenizer(paths[name])
    return paths


def alone(path, pooling):
    """Every text through a model that has read no other."""
    loaded = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    vectors = []
    for text in TEXTS:
        model = copy.deepcopy(loaded)
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        vectors.append((hidden[-1] if pooling == "last" else hidden.mean(0)).numpy())
    return np.array(vectors)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_does_not_depend_on_the_batch(models, name, attention, pooling):
    options = {"device": "cpu", "max_tokens": 160, "pooling": pooling, "attention": attention}
    encoder = Encoder(models[name], **options)
    expected = alone(models[name], pooling)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    assert encoder.counters.reused > 0
    # A long text may have left its frequencies behind.
    for row in (10, 3, 4, 9, 0):
        np.testing.assert_allclose(encoder.encode([TEXTS[row]])[0], expected[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_does_not_depend_on_the_batch(models, name):
    options = {"device": "cpu", "max_tokens": 150, "answer_tokens": 4, "state": "answer"}
    encoder = Encoder(models[name], **options)
    texts = TEXTS[1:6]
    vectors, said = encoder.read([texts])
    for row, text in enumerate(texts):
        [vector], [answer] = encoder.read([[text]])
        np.testing.assert_allclose(vectors[row], vector, atol=1e-5)
        assert said[row] == answer


@pytest.mark.slow
def test_an_answer_that_comes_to_other_frequencies_is_that_of_whole_forwards(models):
    """Each token anew from the whole text: nothing is kept of the frequencies before."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["phi3"]).eval()
    encoder = Encoder(models["phi3"], device="cpu", answer_tokens=5)
    _, said = encoder.read([TEXTS[:5]])
    for text, answer in zip(TEXTS[:5], said, strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        for _ in range(5):
            with torch.no_grad():
                token = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if token.item() in encoder._batched.answers.ends:
                break
        assert answer == encoder.tokenizer.decode(ids[0, len(text) :], skip_special_tokens=True)


def test_groups():
    step, grows = LengthRule((40, 90)), LengthRule((), 40)
    assert [step.group(n) for n in (1, 40, 41, 90, 91)] == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 0)]
    assert [step.group(n, 3) for n in (38, 39, 40, 41)] == [(0, 0), (0, 39), (0, 40), (1, 0)]
    assert [grows.group(n) for n in (1, 40, 41, 90)] == [(0, 0), (0, 0), (0, 41), (0, 90)]
    assert (step.first, grows.first, LengthRule().first) == (40, 40, None)
    assert [step.changes_at(n) for n in (40, 41, 91, 92)] == [False, True, True, False]


def test_rules_of_configurations():
    gemma = transformers.Gemma3TextConfig(
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        },
        max_position_embeddings=64,
    )
    assert length_rule(gemma) == LengthRule((), 64)
    su = type("Older", (), {})()
    su.rope_scaling, su.original_max_position_embeddings = {"type": "su"}, 4096
    assert length_rule(su) == LengthRule((4096,))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for rope in (None, yarn, {"rope_type": "linear", "factor": 2.0}):
        config = transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=128)
        assert length_rule(config) == LengthRule()
    assert length_rule(transformers.BertConfig()) == LengthRule()


def test_positions_of_dynamic_scaling_reach_further_where_asked(models):
    assert Encoder(models["llama_dynamic"], device="cpu").max_tokens == 40
    with pytest.raises(InputError, match=r"outside 8\.\.160"):
        Encoder(models["llama_dynamic"], device="cpu", max_tokens=161)
