"""Weights that are those of the configuration, and every other kind of directory refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.encoding.loading import load
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import tiny_decoder, tiny_tokenizer

TEXTS = ["abc so:", "yz"]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("qwen"))


def changed(path, to, tensors=lambda weights: weights, **config):
    """A copy of a model directory with other tensors or another configuration."""
    shutil.copytree(path, to)
    weights = tensors(load_file(to / "model.safetensors"))
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(about))
    return to


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def saved(model, path):
    torch.manual_seed(0)
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            lambda weights: {f"x.{name}": tensor for name, tensor in weights.items()},
            {},
            r"24 tensors not among its weights, such as embed_tokens\.weight",
        ),
        (without("layers.1."), {}, r"11 tensors not among .*layers\.1\.input_layernorm"),
        (without("layers.0.self_attn.q_proj"), {}, r"1 tensors not among .*layers\.0\.self_attn"),
        (without("model.norm."), {}, r"1 tensors not among .*norm\.weight"),
        (without("embed_tokens"), {}, r"1 tensors not among .*embed_tokens\.weight"),
        (
            lambda weights: weights,
            {"num_hidden_layers": 4, "layer_types": None},
            r"22 tensors not among .*layers\.2\.",
        ),
        (
            lambda weights: weights,
            {"num_hidden_layers": 1, "layer_types": None},
            r"11 tensors left over, such as model\.layers\.1\.",
        ),
        # Another family with the same names: its layers have no norm of queries and keys.
        (
            lambda weights: weights,
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"4 tensors left over, such as model\.layers\.0\.self_attn\.k_norm\.weight",
        ),
        (
            lambda weights: weights,
            {"intermediate_size": 48},
            r"6 tensors of another shape, such as .*mlp\.down_proj\.weight \(\[64, 96\], not \[64, 48\]",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(qwen, tmp_path, tensors, config, message):
    path = changed(qwen, tmp_path / "model", tensors, **config)
    with pytest.raises(InputError, match=f"describes another model than the weights: {message}"):
        Encoder(path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForSequenceClassification",
        "RobertaForMaskedLM",
        "DistilBertForMaskedLM",
        "ElectraForPreTraining",
        "XLMRobertaForSequenceClassification",
    ],
)
def test_heads_that_an_encoder_does_not_need_may_be_there_or_not(tmp_path, name):
    kind = getattr(transformers, name)
    config = kind.config_class(**SMALL, pad_token_id=1)
    model = kind(config).eval()
    encoder = Encoder(saved(model, tmp_path), device="cpu", pooling="mean", normalize=False)
    ids = torch.tensor([encoder.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_missed_only_where_answers_are_wanted_and_it_is_not_tied(tmp_path, tied):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    path = saved(transformers.LlamaModel(config), tmp_path)
    assert Encoder(path, device="cpu").encode(TEXTS).shape == (2, 32)
    if tied:
        assert Encoder(path, device="cpu", answer_tokens=3).read([TEXTS])[1] is not None
    else:
        with pytest.raises(InputError, match=r"such as lm_head\.weight"):
            Encoder(path, device="cpu", answer_tokens=3)


def test_masks_and_positions_of_older_checkpoints_do_not_matter(qwen, tmp_path):
    def older(weights):
        return weights | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0),
            "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
        }

    path = changed(qwen, tmp_path / "model", older)
    same = Encoder(path, device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(same, Encoder(qwen, device="cpu").encode(TEXTS))


def test_loading_leaves_the_logs_of_transformers_as_they_were(qwen):
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load(qwen, torch.float32, torch.device("cpu"), False, None, False)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


def test_a_model_that_cannot_be_moved_or_whose_quantiser_is_missing_is_refused(
    qwen, tmp_path, monkeypatch
):
    path = changed(
        qwen,
        tmp_path / "model",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(InputError, match=r"cannot be loaded: .*(accelerate|bitsandbytes)"):
        Encoder(path, device="cpu")

    def refuses(self, *args, **options):
        raise ValueError("`.to` is not supported for this model")

    monkeypatch.setattr(transformers.Qwen3Model, "to", refuses)
    with pytest.raises(InputError, match=r"cannot be loaded: `\.to` is not supported"):
        Encoder(qwen, device="cpu")


def test_a_divided_model_is_given_to_all_accelerators_or_refused(qwen, monkeypatch):
    """With stand-ins for accelerate and the accelerators: neither is here."""
    asked, plain = [], transformers.AutoModel.from_pretrained

    def divided(parts):
        def from_pretrained(path, device_map, **options):
            asked.append(device_map)
            model, report = plain(path, **options)
            model.hf_device_map = parts
            return model, report

        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
        return load(qwen, torch.float32, torch.device("cpu"), False, None, False, divided=True)

    assert divided({"embed_tokens": 0, "layers.0": 0, "layers.1": 1}).model is not None
    assert asked == ["auto"]
    with pytest.raises(InputError, match=r"1 of its 2 parts do not fit, such as layers\.1"):
        divided({"layers.0": 0, "layers.1": "cpu"})


def test_where_a_divided_model_makes_no_sense(qwen, monkeypatch):
    for options in (
        {"answer_tokens": 2},
        {"attention": "packed"},
        {"compilation": "default"},
        {"backend": "vllm"},
    ):
        with pytest.raises(InputError, match="--device all: a divided model is read padded"):
            Encoder(qwen, device="all", **options)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--device all: this machine has no accelerator"):
        Encoder(qwen, device="all")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one worker takes all accelerators"):
        Encoder(qwen, device="all")


def test_a_device_that_gives_nothing_back_is_refused(qwen):
    with pytest.raises(InputError, match="device 'meta' cannot be used"):
        Encoder(qwen, device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "MPNet", "Camembert"])
def test_positions_that_begin_behind_padding_leave_less_room(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(**SMALL, pad_token_id=1)
    path = saved(getattr(transformers, f"{family}Model")(config), tmp_path)
    encoder = Encoder(path, device="cpu")
    assert encoder.max_tokens == 62
    assert np.isfinite(encoder.encode(["x" * 100, "y"])).all()
    with pytest.raises(InputError, match=r"max_tokens: 63 is outside 8\.\.62"):
        Encoder(path, device="cpu", max_tokens=63)


def test_an_encoder_without_its_decoder_is_read_and_one_with_it_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    model = transformers.T5EncoderModel(config).eval()
    encoder = Encoder(saved(model, tmp_path / "half"), device="cpu", normalize=False)
    ids = torch.tensor([encoder.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], expected, atol=1e-5)
    whole = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "whole")
    with pytest.raises(InputError, match="'t5' is an encoder-decoder"):
        Encoder(whole, device="cpu")
    about = json.loads((whole / "config.json").read_text())
    del about["is_encoder_decoder"]
    (whole / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="'t5' is an encoder-decoder"):
        Encoder(whole, device="cpu")


def test_xlnet_reads_both_ways_and_has_no_limit_of_its_own(tmp_path):
    config = transformers.XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=64)
    model = transformers.XLNetLMHeadModel(config).eval()
    encoder = Encoder(saved(model, tmp_path), device="cpu", normalize=False)
    assert (encoder.kind, encoder.max_tokens) == ("encoder", 256)
    ids = torch.tensor([encoder.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = model.transformer(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], expected, atol=1e-5)


def vision_and_text(family):
    """A tiny model of images and text: its text's sizes stand in a configuration of their own."""
    text = SMALL | {"num_key_value_heads": 1, "head_dim": 16}
    if family == "Gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = transformers.Gemma3Config(text_config=text, vision_config=vision)
        return transformers.Gemma3ForConditionalGeneration(config)
    if family == "Qwen2VL":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
        text = text | {"rope_parameters": rope}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
        return transformers.Qwen2VLForConditionalGeneration(config)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision |= {"model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config=text | {"model_type": "llama"}, vision_config=vision
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Gemma3", "Qwen2VL", "Llava"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_a_model_of_images_and_text_reads_text(tmp_path, family, layer):
    torch.manual_seed(0)
    model = vision_and_text(family).eval()
    path = saved(model, tmp_path / "model")
    encoder = Encoder(path, device="cpu", layer=layer)
    assert (encoder.kind, encoder.dim, encoder.max_tokens) == ("decoder", 32, 64)
    ids = torch.tensor([encoder.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], states[layer][0, -1].numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"layer: 3 is outside -3\.\.2"):
        Encoder(path, device="cpu", layer=3)
    if layer == -1:
        answers = Encoder(path, device="cpu", answer_tokens=2).read([TEXTS])[1]
        assert len(answers) == 2
        blind = changed(path, tmp_path / "blind", without("vision"))
        np.testing.assert_array_equal(
            Encoder(blind, device="cpu").encode(TEXTS), encoder.encode(TEXTS)
        )
        with pytest.raises(InputError, match="tensors not among its weights"):
            Encoder(changed(path, tmp_path / "half", without("layers.1.")), device="cpu")
