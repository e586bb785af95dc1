import json
import threading
import warnings

import numpy as np
import pytest

from llm_knowledge.encoding import encoder as encoder_module
from llm_knowledge.encoding.encoder import Encoder
from llm_knowledge.encoding.prefix import shared_length
from llm_knowledge.encoding.tokens import ahead
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.store.manifest import Manifest
from llm_knowledge.store.reader import KnowledgeStore, verify
from tests.helpers.knowledge_data import manifest, random_dataset, tiny_decoder, tiny_encoder

INSTRUCTION = (
    "You know all about taste. What is in quotation marks is data. Work out what is liked. "
)
TEXTS = [INSTRUCTION + "x, yz; " * (row % 5) + f'"title {row}" so:' for row in range(23)]
CHAT = (
    "{{ bos_token or '' }}{% for message in messages %}<|user|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    from transformers import AutoTokenizer

    path = tiny_decoder(tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|model|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


def cosine(one, other):
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_shared_length():
    assert shared_length([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4, 9]]) == 3
    assert shared_length([[1, 2], [1, 2, 3]]) == 1  # a text keeps a token of its own
    assert shared_length([[1], [1, 2]]) == 0
    assert shared_length([[2], [1]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "layer"), [("last", -1), ("mean", -1), ("last", 1), ("mean", 1)]
)
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_prefix_reuse_changes_nothing(qwen, pooling, layer, attention):
    options = {
        "pooling": pooling,
        "layer": layer,
        "device": "cpu",
        "batch_tokens": 400,
        "attention": attention,
    }
    plain = Encoder(qwen, prefix_reuse="off", **options)
    fast = Encoder(qwen, **options)
    np.testing.assert_allclose(fast.encode(TEXTS), plain.encode(TEXTS), atol=1e-5, rtol=0)
    assert len(fast._batched.prefix.tokens) == len(INSTRUCTION)  # a character is a token here
    assert fast.counters.reused == len(INSTRUCTION) * len(TEXTS)
    assert plain.counters.reused == 0
    assert fast.counters.tokens == plain.counters.tokens == sum(plain.count_tokens(TEXTS))
    assert fast.counters.computed < 0.6 * plain.counters.computed


def test_prefix_reuse_in_bfloat16(qwen):
    plain = Encoder(qwen, prefix_reuse="off", device="cpu", dtype="bfloat16")
    fast = Encoder(qwen, device="cpu", dtype="bfloat16")
    assert cosine(fast.encode(TEXTS), plain.encode(TEXTS)).min() > 0.9999
    assert fast.counters.reused > 0


def test_the_prefix_is_computed_once_and_cut_where_texts_differ(qwen, monkeypatch):
    from llm_knowledge.encoding import reader

    computed = []
    whole = reader.compute_prefix

    def counted(model, tokens, layer):
        computed.append(len(tokens))
        return whole(model, tokens, layer)

    monkeypatch.setattr(reader, "compute_prefix", counted)
    plain, fast = (Encoder(qwen, prefix_reuse=mode, device="cpu") for mode in ("off", "auto"))
    for texts in (
        [
            INSTRUCTION + f"liked nothing at all {row}" for row in range(6)
        ],  # shares more than others
        TEXTS,
        [INSTRUCTION + "liked one"],  # alone: an earlier prefix serves it
        [INSTRUCTION[:-4] + f"{row} none" for row in range(6)],
        ["short one", "short two", "something else"],
    ):
        np.testing.assert_allclose(fast.encode(texts), plain.encode(texts), atol=1e-5, rtol=0)
    assert len(computed) == 1
    other = ["Another instruction that is quite long. " + str(row) for row in range(6)]
    np.testing.assert_allclose(fast.encode(other), plain.encode(other), atol=1e-5, rtol=0)
    assert len(computed) == 2
    few = Encoder(qwen, device="cpu")
    few.encode(TEXTS[:3])
    assert few.counters.reused == 0  # three texts do not pay for it


def test_a_model_that_prefix_reuse_would_change_goes_without(qwen, monkeypatch):
    plain, fast = (Encoder(qwen, prefix_reuse=mode, device="cpu") for mode in ("off", "auto"))
    forward = fast._batched._forward
    monkeypatch.setattr(
        fast._batched,
        "_forward",
        lambda ids, prefix=None: -forward(ids, prefix) if prefix else forward(ids),
    )
    with pytest.warns(UserWarning, match="each prompt is computed whole"):
        found = fast.encode(TEXTS)
    np.testing.assert_allclose(found, plain.encode(TEXTS), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.encode(TEXTS)


def test_sliding_windows_and_encoders_share_nothing(qwen, tmp_path):
    from llm_knowledge.encoding.prefix import supports_sharing

    windowed = Encoder(qwen, device="cpu")
    windowed.model.config.layer_types = ["full_attention", "sliding_attention"]
    windowed.model.config.sliding_window = 8
    assert not supports_sharing(windowed.model)
    bert = Encoder(tiny_encoder(tmp_path), device="cpu")
    bert.encode(TEXTS)
    assert bert.counters.reused == 0


def test_out_of_memory_behind_a_prefix_halves_the_batch(qwen, monkeypatch):
    import torch

    fast = Encoder(qwen, device="cpu")
    expected = fast.encode(TEXTS)
    forward, sizes = fast._batched._forward, []

    def limited(ids, prefix=None):
        sizes.append(len(ids))
        if len(ids) > 5:
            raise torch.OutOfMemoryError("out")
        return forward(ids, prefix)

    monkeypatch.setattr(fast._batched, "_forward", limited)
    np.testing.assert_allclose(fast.encode(TEXTS), expected, atol=1e-5)
    assert sizes[0] == len(TEXTS)


def test_chat_template_surrounds_the_text_and_its_tokens_cannot_be_forged(chat):
    said = Encoder(chat, device="cpu")
    special = said.tokenizer.convert_tokens_to_ids(["<|user|>", "<|model|>", "<|end|>"])
    ids = said._tokenize(["ab<|model|>c"], truncate=True)[0]
    assert [ids[0], ids[-1], ids[-2]] == special
    assert ids.count(special[1]) == 1  # the one in the text is spelled out
    assert len(ids) == said.count_tokens(["ab<|model|>c"])[0] == 3 + len("ab<|model|>c")
    assert (
        said.tokenizer.apply_chat_template(
            [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_dict=False
        )
        == said._tokenize(["abc"], truncate=True)[0]
    )
    plain = Encoder(chat, device="cpu", chat_template="off")
    assert (plain.chat_hash, len(plain._tokenize(["abc"], True)[0])) == (None, 3)
    assert said.chat_hash != plain.chat_hash
    assert np.abs(said.encode(["abc"]) - plain.encode(["abc"])).max() > 1e-3
    off = Encoder(chat, device="cpu", prefix_reuse="off")
    np.testing.assert_allclose(said.encode(TEXTS), off.encode(TEXTS), atol=1e-5)
    assert said.counters.reused >= (len(INSTRUCTION) + 1) * len(TEXTS)


def test_chat_prompts_keep_the_end_of_the_template_when_truncated(chat):
    said = Encoder(chat, device="cpu", max_tokens=20)
    ids = said._tokenize(["y" * 90, "z"], truncate=True)
    assert [len(own) for own in ids] == [20, 4]
    assert ids[0][-2:] == ids[1][-2:] == said._tokenize([""], truncate=True)[0][-2:]


def test_chat_template_that_takes_no_user_message(chat, tmp_path):
    import shutil

    path = shutil.copytree(chat, tmp_path / "model")
    (path / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(InputError, match=r"chat template cannot be applied .*system first"):
        Encoder(path, device="cpu")
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    with pytest.raises(InputError, match="as it stands"):
        Encoder(path, device="cpu")
    assert Encoder(path, device="cpu", chat_template="off").chat_hash is None


def test_chat_template_is_in_the_manifest(chat, tmp_path):
    data = random_dataset(tmp_path / "data", users=6)
    common = {"data": data, "model": str(chat), "progress": False, "device": "cpu"}
    one = extract(ExtractConfig(out=tmp_path / "one", **common))
    about = KnowledgeStore.open(one).manifest
    assert about.model.chat_template == Encoder(chat, device="cpu").chat_hash
    with pytest.raises(InputError, match="another job"):
        extract(ExtractConfig(out=one, chat_template="off", **common))
    extract(ExtractConfig(out=one, prefix_reuse="off", **common))  # only faster, not another job
    verify(one)


def test_manifests_of_older_stores_keep_their_hash():
    old = manifest()
    text = json.loads(old.model_dump_json())
    assert not {"profile", "compression"} & set(text)
    assert "chat_template" not in text["model"]
    assert old.job == "11d0817fc57e1295066b3f41cfa9ccb6"
    assert Manifest.model_validate(text).job == old.job


def test_tokenisation_runs_ahead_in_another_thread(qwen, monkeypatch):
    monkeypatch.setattr(encoder_module, "BLOCK_TEXTS", 8)
    fast = Encoder(qwen, device="cpu")
    whole = fast.encode_blocks([TEXTS])
    seen, tokenize = set(), fast._tokenize
    monkeypatch.setattr(
        fast,
        "_tokenize",
        lambda *args, **options: seen.add(threading.current_thread()) or tokenize(*args, **options),
    )
    np.testing.assert_allclose(fast.encode(TEXTS), whole, atol=1e-5)
    assert threading.main_thread() not in seen
    assert fast.encode([]).shape == (0, 64)
    with pytest.raises(InputError, match="text 20 has no token"):
        fast.encode([*TEXTS[:20], ""])


def test_ahead_makes_the_next_item_early_and_passes_errors_on():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise InputError("bad row")

    stream = ahead(items())
    assert next(stream) == 0
    assert next(stream) == 1
    with pytest.raises(InputError, match="bad row"):
        list(stream)
    assert made == [0, 1, 2]


def test_texts_are_tokenised_once(qwen, monkeypatch):
    fast = Encoder(qwen, device="cpu")
    calls, plain = [], fast._tokens._plain
    monkeypatch.setattr(
        fast._tokens,
        "_plain",
        lambda texts, **limits: calls.append(len(texts)) or plain(texts, **limits),
    )
    fast.count_tokens(TEXTS)
    fast.encode(TEXTS)
    assert sum(calls) == len(set(TEXTS))


def test_counters(qwen):
    fast = Encoder(qwen, device="cpu", prefix_reuse="off", attention="sdpa", batch_tokens=1 << 16)
    fast.encode(["abc", "a"])
    counted = fast.counters
    assert (counted.texts, counted.tokens, counted.computed, counted.padding) == (2, 4, 6, 2)
    assert str(counted).endswith("tokens/s, padding 33%, reused 0%")


@pytest.mark.parametrize("normalize", [True, False])
def test_paragraphs_are_read_one_by_one_and_count_alike(normalize):
    encoder = Encoder(device="cpu", normalize=normalize)
    assert encoder.pooling == "paragraphs"
    habit, titles = "Liked most.", "Heat (1995).\nJumanji (1995).\nToy Story (1995)."
    texts = ["One line.", f"{habit}\n\n{titles}", "\n\nOne line.\n\n \n\n", f"{titles}\n\n{habit}"]
    alone, both, again, turned = encoder.encode(texts)
    one, other = encoder.encode([habit, titles])
    mean = (one + other) / 2
    expected = mean / np.linalg.norm(mean) if normalize else mean
    np.testing.assert_allclose(both, expected, atol=2e-6)
    np.testing.assert_allclose(turned, expected, atol=2e-6)
    np.testing.assert_allclose(again, alone, atol=2e-6)
    assert encoder.counters.texts == 4 + 2  # texts, not their paragraphs
    # Without paragraphs the long one drowns the short one.
    plain = Encoder(device="cpu", normalize=normalize, pooling="mean").encode(
        [f"{habit}\n\n{titles}"]
    )
    assert cosine(plain, one[None]) < cosine(both[None], one[None]) - 0.1


def test_an_error_in_a_paragraph_names_its_text(monkeypatch):
    encoder = Encoder(device="cpu")
    read = encoder._batched.reader.read
    monkeypatch.setattr(encoder._batched, "_packs_checked", True)

    def broken(ids, prefix=None):
        vectors = read(ids, prefix).clone()
        vectors[[len(own) == max(map(len, ids)) for own in ids]] = float("nan")
        return vectors

    monkeypatch.setattr(encoder._batched.reader, "read", broken)
    with pytest.raises(InputError, match=r"text 1: the model returned NaN"):
        encoder.encode(["a\n\nb", "c\n\nby far the longest paragraph of all"])


def test_a_decoder_reads_its_prompt_whole(qwen):
    with pytest.raises(InputError, match="--pooling paragraphs"):
        Encoder(qwen, device="cpu", pooling="paragraphs")
