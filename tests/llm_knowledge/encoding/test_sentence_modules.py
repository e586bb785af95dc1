"""Directories of sentence-transformers say how their vectors are made."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.store.reader import KnowledgeStore
from tests.helpers.knowledge_data import random_dataset, tiny_decoder, tiny_encoder

TEXTS = ["abc so:", "yz", "first\n\nsecond one"]
MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


def modes(*on):
    return {f"pooling_mode_{mode}": mode in on for mode in MODES}


def sentence_model(path, pooling, *more, decoder=False):
    """A tiny model with `modules.json`: its pooling's configuration and what comes behind."""
    (tiny_decoder if decoder else tiny_encoder)(path)
    kinds = ["Transformer", "Pooling", *more]
    folders = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds) if place)]
    names = [f"sentence_transformers.models.{kind}" for kind in kinds]
    listed = [
        {"idx": place, "name": str(place), "path": folder, "type": name}
        for place, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, **pooling, "include_prompt": True})
    )
    return path


def states(path, text):
    encoder = Encoder(path, device="cpu")
    with torch.no_grad():
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        return AutoModel.from_pretrained(path).eval()(ids).last_hidden_state[0].numpy()


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("pooling", "decoder", "name", "take"),
    [
        (modes("cls_token"), False, "cls", lambda hidden: hidden[0]),
        ({"pooling_mode": "cls"}, False, "cls", lambda hidden: hidden[0]),
        (modes("mean_tokens"), False, "paragraphs", lambda hidden: hidden.mean(0)),
        (modes("lasttoken"), False, "last", lambda hidden: hidden[-1]),
        (modes("lasttoken"), True, "last", lambda hidden: hidden[-1]),
        ({"pooling_mode": ["mean"]}, True, "mean", lambda hidden: hidden.mean(0)),
    ],
)
def test_vectors_are_those_of_the_modules(tmp_path, attention, pooling, decoder, name, take):
    raw = sentence_model(tmp_path / "raw", pooling, decoder=decoder)
    unit = sentence_model(tmp_path / "unit", pooling, "Normalize", decoder=decoder)
    encoder, scaled = (Encoder(path, device="cpu", attention=attention) for path in (raw, unit))
    assert (encoder.pooling, encoder.normalize, scaled.normalize) == (name, False, True)
    expected = np.array([take(states(raw, text)) for text in TEXTS[:2]])
    np.testing.assert_allclose(encoder.encode(TEXTS)[:2], expected, atol=1e-5)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled.encode(TEXTS)[:2], expected, atol=1e-5)


def test_options_are_stronger_than_the_directory(tmp_path):
    path = sentence_model(tmp_path, modes("cls_token"), "Normalize")
    encoder = Encoder(path, device="cpu", pooling="mean", normalize=False)
    assert (encoder.pooling, encoder.normalize) == ("mean", False)
    mean = states(path, TEXTS[0]).mean(0)
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], mean, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "more", "message"),
    [
        (modes("max_tokens"), (), "pooling by max_tokens, which is not served; name --pooling"),
        (modes("cls_token", "mean_tokens"), (), "pooling by cls_token and mean_tokens"),
        (modes(), (), "pooling by nothing"),
        ({"pooling_mode": "weightedmean"}, (), "pooling by weightedmean"),
        (modes("mean_tokens"), ("Dense", "Normalize"), r"a module Dense \(2_Dense\)"),
    ],
)
def test_what_is_not_served_is_refused_unless_pooling_is_named(tmp_path, pooling, more, message):
    path = sentence_model(tmp_path, pooling, *more)
    with pytest.raises(InputError, match=message):
        Encoder(path, device="cpu")
    assert Encoder(path, device="cpu", pooling="mean").encode(TEXTS).shape == (3, 32)


def test_broken_files_are_named(tmp_path):
    path = sentence_model(tmp_path, modes("cls_token"))
    (path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(InputError, match=r"1_Pooling.config\.json: not a readable"):
        Encoder(path, device="cpu")
    (path / "modules.json").write_text("{}")
    with pytest.raises(InputError, match=r"modules\.json: is no list of modules"):
        Encoder(path, device="cpu")


def test_first_tokens_of_decoders_are_refused(tmp_path):
    path = sentence_model(tmp_path, modes("cls_token"), decoder=True)
    for pooling in ("auto", "cls"):
        with pytest.raises(
            InputError, match="--pooling cls: a decoder's first token sees no other"
        ):
            Encoder(path, device="cpu", pooling=pooling)


def test_a_sentence_model_reads_plain_texts_whatever_template_it_inherited(tmp_path):
    path = sentence_model(tmp_path, modes("lasttoken"), decoder=True)
    (path / "chat_template.jinja").write_text("x{{ messages[0]['content'] }}")
    assert Encoder(path, device="cpu").chat_hash is None
    (path / "modules.json").unlink()
    assert Encoder(path, device="cpu").chat_hash is not None


def test_the_manifest_says_it_and_a_refresh_keeps_it(tmp_path):
    model = sentence_model(tmp_path / "model", modes("cls_token"), "Normalize")
    data = random_dataset(tmp_path / "data", users=6)
    common = {"data": data, "model": str(model), "progress": False, "device": "cpu"}
    store = extract(ExtractConfig(out=tmp_path / "store", **common))
    about = KnowledgeStore.open(store).manifest
    assert (about.pooling, about.normalized) == ("cls", True)
    with pytest.raises(InputError, match=r"another job \(pooling: 'cls' there, 'mean' now"):
        extract(ExtractConfig(out=store, pooling="mean", **common))
    assert refresh(store, data, tmp_path / "new", model=str(model), device="cpu").kept == 6
    assert KnowledgeStore.open(tmp_path / "new").manifest.pooling == "cls"
