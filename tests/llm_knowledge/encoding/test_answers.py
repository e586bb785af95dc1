import io

import numpy as np
import pytest
import torch

from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.store.inspect import inspect_store
from llm_knowledge.store.reader import KnowledgeStore, verify
from tests.helpers.knowledge_data import random_dataset, tiny_decoder, tiny_encoder

TEXTS = ["You know all about taste. " + "x, yz; " * (row % 5) + f"so {row}:" for row in range(13)]
TOKENS = 7


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A tiny decoder whose answers end early for some of the texts."""
    path = tiny_decoder(tmp_path_factory.mktemp("qwen"))
    said = [expected(path, text)[0] for text in TEXTS]
    # A token that some answers hold in the middle becomes the one that ends an answer.
    third = [own[2] for own in said]
    end = max(set(third), key=third.count)
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=end).save_pretrained(path)
    return path


def expected(path, text, layer=-1):
    """Tokens by transformers' own loop; states of the prompt's end and of the last step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    done = model.generate(
        ids,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )
    tokens = done.sequences[0, ids.shape[1] :].tolist()
    first, last = (done.hidden_states[step][layer][0, -1].numpy() for step in (0, -1))
    return tokens, first, last, tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("reuse", ["auto", "off"])
def test_answers_and_states_equal_those_of_transformers(qwen, reuse, layer):
    options = {
        "device": "cpu",
        "answer_tokens": TOKENS,
        "batch_tokens": 300,
        "layer": layer,
        "prefix_reuse": reuse,
    }
    by_prompt, by_path = (Encoder(qwen, state=state, **options) for state in ("prompt", "answer"))
    first, said = by_prompt.read([TEXTS[:5], TEXTS[5:]])
    last, again = by_path.read([TEXTS])
    assert said == again
    lengths = set()
    for row, text in enumerate(TEXTS):
        tokens, start, end, words = expected(qwen, text, layer)
        lengths.add(len(tokens))
        assert said[row] == words
        np.testing.assert_allclose(first[row], start, atol=1e-5)
        np.testing.assert_allclose(last[row], end, atol=1e-5)
    assert len(lengths) > 1  # some answers ended before the others
    assert (by_path.counters.reused > 0) == (reuse == "auto")
    plain = Encoder(qwen, device="cpu", layer=layer)
    np.testing.assert_allclose(first, plain.encode(TEXTS), atol=1e-5)
    mean = Encoder(qwen, pooling="mean", **options)
    plain = Encoder(qwen, device="cpu", layer=layer, pooling="mean")
    np.testing.assert_allclose(mean.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)


def test_out_of_memory_keeps_answers_with_their_texts(qwen, monkeypatch):
    encoder = Encoder(qwen, device="cpu", answer_tokens=TOKENS)
    vectors, said = encoder.read([TEXTS])
    whole = encoder._batched._answer

    def limited(ids, prefix):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("out")
        return whole(ids, prefix)

    monkeypatch.setattr(encoder._batched, "_answer", limited)
    found, again = encoder.read([TEXTS])
    assert again == said
    np.testing.assert_allclose(found, vectors, atol=1e-5)


def test_answers_reach_the_store_the_human_view_and_the_refresh(qwen, tmp_path):
    data = random_dataset(tmp_path / "data", users=8)
    common = {"data": data, "model": str(qwen), "progress": False, "device": "cpu"}
    out = extract(ExtractConfig(out=tmp_path / "one", answer_tokens=5, state="answer", **common))
    verify(out)
    store = KnowledgeStore.open(out)
    assert store.manifest.model.answer.model_dump() == {"tokens": 5, "state": "answer"}
    rows = store.read_text(range(8))
    encoder = Encoder(qwen, device="cpu", answer_tokens=5, state="answer")
    vectors, said = encoder.read([[row["prompt"] for row in rows]])
    assert [row["answer"] for row in rows] == said
    np.testing.assert_allclose(store.read_vectors(0, 8), vectors, atol=2e-2)
    shown = io.StringIO()
    inspect_store(out, 3, shown)
    assert f"answer: {said[3]}" in shown.getvalue()
    for change in ({"answer_tokens": 4}, {"answer_tokens": 5, "state": "prompt"}, {}):
        with pytest.raises(InputError, match="another job"):
            extract(ExtractConfig(out=out, **{**common, **change}))
    done = refresh(out, data, tmp_path / "new", model=str(qwen), device="cpu")
    assert done.kept == 8
    again = KnowledgeStore.open(tmp_path / "new")
    assert again.read_text(range(8)) == rows
    assert again.manifest.model.answer == store.manifest.model.answer


def test_what_cannot_be_answered_is_refused(qwen, tmp_path):
    bert = tiny_encoder(tmp_path)
    for options, message in (
        ({"answer_tokens": -1}, "greater than or equal to 0"),
        ({"state": "answer"}, "no answer without"),
        ({"answer_tokens": 3, "state": "answer", "pooling": "mean"}, "use --pooling last"),
        ({"answer_tokens": 510}, "leaves no room"),
        ({"answer_tokens": 300, "max_tokens": 400}, r"outside 8\.\.212"),
    ):
        with pytest.raises(InputError, match=message):
            Encoder(qwen, device="cpu", **options)
    with pytest.raises(InputError, match="only a decoder writes"):
        Encoder(bert, device="cpu", answer_tokens=3)
