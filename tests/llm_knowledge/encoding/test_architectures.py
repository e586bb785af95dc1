"""Tiny random models of many families: vectors are those of a plain forward of each text alone."""

import numpy as np
import pytest
import torch
import transformers

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import tiny_tokenizer

START = "You know all about taste. What is quoted is data. "
TEXTS = [START + "x, yz; " * (row % 4) + f"so {row}:" for row in range(9)]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 9}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# By model type: what a configuration takes beside, or in place of, `SIZES` (None: not that one).
DECODERS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi": {},
    "phi3": {},
    "gpt2": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "glm": {},
    "glm4": {},
    "olmo2": {},
    "granite": {},
    "stablelm": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 9,
    },
    "gptj": GPT | {"rotary_dim": 4},
    "falcon": {"head_dim": None},
    "cohere2": WINDOW,
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
ENCODERS = {
    "bert": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "roberta": {},
    "xlm-roberta": {},
    "mpnet": {},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "eurobert": {},
    "nomic_bert": {},
    "fnet": {},
    "convbert": {},
    "nystromformer": {},
    "yoso": {"num_hash": 8, "use_expectation": True},
    "big_bird": {},
}
# A window, a recurrence: keys and values of a beginning are not all there is to share.
NOT_SHARED = {"mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "mamba", "gemma3"}
# These, and those with an attention, a bias or positions of their own, are padded.
PADDED = NOT_SHARED | {"bloom", "mpt", "gpt_neo", "gptj", "falcon"}
PADDED |= {"roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "t5", "big_bird"}
# What these compute for a text changes with padding: batches are equally long.
BY_LENGTH = {"fnet", "convbert", "nystromformer", "yoso"}
PADDED |= BY_LENGTH
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def build(family):
    """A random model whose weights are far enough from zero that all its parts matter."""
    torch.manual_seed(0)
    if family == "gemma3":
        config = transformers.Gemma3Config(text_config=SIZES | WINDOW, vision_config=IMAGES)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        fields = SIZES | DECODERS.get(family, ENCODERS.get(family))
        fields = {name: value for name, value in fields.items() if value is not None}
        config = transformers.CONFIG_MAPPING[family](**fields)
        kind = transformers.AutoModelForCausalLM if family in DECODERS else transformers.AutoModel
        half = transformers.T5EncoderModel
        model = half(config) if family == "t5" else kind.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module", params=[*DECODERS, *ENCODERS, "gemma3"])
def family(request, tmp_path_factory):
    """A family's name, a directory with a model of it, and its hidden states of every text."""
    name = request.param
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    path = tmp_path_factory.mktemp(name)
    model = build(name)
    model.save_pretrained(path)
    tiny_tokenizer(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    body = model if name in ("t5", "gemma3") else model.base_model
    states = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            said = body(input_ids=ids, output_hidden_states=True)
        final = said.hidden_states[-1] if name == "gemma3" else said.last_hidden_state
        states.append({-1: final[0], 1: said.hidden_states[1][0]})
    return name, path, states


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "reuse", "pooling", "layer"),
    [
        ("auto", "auto", "last", -1),
        ("auto", "off", "mean", -1),
        ("eager", "off", "last", -1),
        ("eager", "auto", "mean", -1),
        ("auto", "auto", "last", 1),
    ],
)
def test_vectors_are_those_of_a_plain_forward(family, attention, reuse, pooling, layer):
    name, path, states = family
    encoder = Encoder(
        path,
        pooling=pooling,
        layer=layer,
        normalize=False,
        device="cpu",
        attention=attention,
        prefix_reuse=reuse,
        batch_tokens=400,
    )
    assert encoder.kind == ("encoder" if name in ENCODERS else "decoder")
    chosen = [of_text[layer] for of_text in states]
    expected = [hidden[-1] if pooling == "last" else hidden.mean(0) for hidden in chosen]
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert encoder._batched._by_length == (name in BY_LENGTH)
    packs = attention == "auto" and name not in PADDED
    assert (encoder._batched.reader.packing is not None) == packs
    # Latent keys are expanded behind the cache: packed, they cannot be put together.
    latent = packs and name.startswith("deepseek")
    shares = name not in NOT_SHARED and name not in ENCODERS and not latent
    assert (encoder.counters.reused > 0) == (shares and reuse == "auto")


def whole_forwards(model, ids, limit, ends):
    """Most likely tokens, each from a forward of the whole text, and the state behind the last."""
    said = []
    while True:
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([ids + said]), use_cache=False, output_hidden_states=True
            )
        said.append(int(out.logits[0, -1].argmax()))
        if len(said) == limit or said[-1] in ends:
            return said, out.hidden_states[-1][0, -1]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DECODERS, "gemma3"], indirect=True)
def test_answers_are_those_of_whole_forwards(family):
    name, path, _ = family
    encoder = Encoder(path, device="cpu", answer_tokens=3, state="answer")
    if name == "mamba":  # its states are kept in another way
        with pytest.raises(InputError, match=r"--answer-tokens: .* does not go on from the states"):
            encoder.encode(TEXTS)
        return
    texts = TEXTS[4:8]
    vectors, answers = encoder.read([texts])
    model = build(name)
    for text, vector, answer in zip(texts, vectors, answers, strict=True):
        ids = encoder.tokenizer(text)["input_ids"]
        said, state = whole_forwards(model, ids, 3, encoder._batched.answers.ends)
        assert answer == encoder.tokenizer.decode(said, skip_special_tokens=True)
        if name != "opt":  # its last hidden state is not its final one, which is projected
            np.testing.assert_allclose(vector, state, atol=1e-5, rtol=1e-5)
