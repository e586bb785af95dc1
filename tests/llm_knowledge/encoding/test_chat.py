"""A chat is tokenised as one, and what a text spells never steers the model."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast

from llm_knowledge.encoding.chat import render_chat
from llm_knowledge.encoding.tokens import Tokens
from llm_knowledge.errors import InputError

LETTERS = [chr(code) for code in range(33, 127)]
INST = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
TIGHT = "{{ bos_token }}[INST]{{ messages[0]['content'] }}[/INST]"
BARE = "Say: {{ messages[0]['content'] }} now"
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
KINDS = ("first", "always", "never", "legacy", "bytes", "unigram")
WORDS = (
    "the",
    "theme and th",
    " the",
    "the ",
    "\nthe\n",
    "a  the",
    "",
    ">the",
    "Zoë",
    "the [/INS T]",
)


def tokenizer(kind, template=TIGHT):
    """A tiny tokenizer of one of the kinds that chat models have."""
    specials = ["<unk>", "<s>", "</s>"]
    merges = [("▁", "t"), ("▁t", "h"), ("t", "h"), (">", "\n"), ("Ċ", "Ċ"), (">", "Ċ"), ("Ġ", "t")]
    if kind == "unigram":
        pieces = [(token, 0.0) for token in specials] + [("▁", -2.0), ("▁th", -3.0), ("\n", -5.0)]
        backend = Tokenizer(models.Unigram(pieces + [(c, -5.0) for c in LETTERS], unk_id=0))
    else:
        bytes_ = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(LETTERS))
        tokens = dict.fromkeys([*specials, "▁", "\n", *LETTERS, *bytes_, *map("".join, merges)])
        ids = {token: number for number, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    if kind == "legacy":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(parts)
    elif kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        scheme = "always" if kind == "unigram" else kind
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    steering = ["[INST]", "[/INST]", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens({"additional_special_tokens": steering})
    made.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>", "\n\n")])
    made.chat_template = template
    return made


def applied(made, text):
    return made.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=False,
    )


@pytest.mark.parametrize("template", [INST, TIGHT, BARE, QWEN3])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_chat(kind, template):
    made = tokenizer(kind, template)
    assert Tokens(made, 512, True).ids(WORDS, True) == [applied(made, text) for text in WORDS]


def test_metaspace_at_the_beginning_alone_makes_no_token_within_a_chat():
    made = tokenizer("first")
    [ids] = Tokens(made, 512, True).ids(["the"], True)
    assert made.convert_ids_to_tokens(ids) == ["<s>", "[INST]", "th", "e", "[/INST]"]


@pytest.mark.parametrize("template", [INST, TIGHT, BARE, QWEN3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_text_spells_steers_nothing_and_leaves_the_rest_as_it_is(kind, template):
    made = tokenizer(kind, template)
    tokens = Tokens(made, 512, True)
    spelled = ["<s>", "[/INST]", "</s>", "<|im_start|>", "<unk>"]
    spelled += ["<think>"] if template == QWEN3 else []  # elsewhere it steers nothing
    for control in spelled:
        texts = [f"the {control} the", f"{control}the", f"the{control}", control]
        # The same with letters that no token is made of: everything but them has the same ids.
        plain = [text.replace(control, "~" * len(control)) for text in texts]
        steering = set(made.all_special_ids) | set(made.convert_tokens_to_ids(["<think>"]))
        for ids, other in zip(tokens.ids(texts, True), tokens.ids(plain, True), strict=True):
            assert [i for i in ids if i in steering - {0}] == [
                i for i in other if i in steering - {0}
            ]
            letters = "".join(made.convert_ids_to_tokens(ids))
            if kind != "unigram" or control not in ("<s>", "</s>", "<unk>"):
                assert control in letters.replace("▁", "").replace("Ġ", "")
                assert control == "<think>" or len(ids) == len(other)  # "th" is a token
            same = ids[: other.index(made.convert_tokens_to_ids("~"))]
            assert same == other[: len(same)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_text_spells_is_no_special_token_without_a_chat_either(kind):
    made = tokenizer(kind)
    tokens = Tokens(made, 512, False)
    assert tokens.chat is None
    ids = tokens.ids(["a<s>b [INST] </s>"], True)[0]
    assert not set(made.convert_tokens_to_ids(["<s>", "</s>", "[INST]"])) & set(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the theme " * 40, "a<s>b[/INST] " * 40, "x" * 500])
def test_a_long_text_loses_its_end_and_the_template_nothing(kind, text):
    made = tokenizer(kind, INST)
    tokens = Tokens(made, 40, True)
    [ids] = tokens.ids([text], True)
    whole = tokens.ids([text], False)[0]
    assert 38 <= len(ids) <= 40 < len(whole)
    tail = applied(made, "y")[-2:]
    assert ids[-1:] == tail[-1:]
    assert ids[:30] == whole[:30]
    kept = next(n for n in range(len(text)) if tokens.ids([text[:n]], False)[0] == ids)
    assert len(tokens.ids([text[: kept + 1]], False)[0]) > 40


def test_a_template_that_is_longer_than_a_prompt_is_refused():
    with pytest.raises(
        InputError, match=r"template alone takes .* tokens, max_tokens is 8; raise it"
    ):
        Tokens(tokenizer("bytes", QWEN3), 8, True).ids(["the"], True)


def test_white_space_that_a_template_takes_off_is_no_part_of_the_text():
    made = tokenizer("bytes", INST.replace("['content']", "['content'] | trim"))
    texts = ["  the\n", "a"]
    assert Tokens(made, 512, True).ids(texts, True) == [applied(made, text) for text in texts]


def test_a_template_that_takes_a_message_in_parts():
    made = tokenizer("bytes", INST.replace("['content']", "['content'][0]['text']"))
    message = [{"role": "user", "content": [{"type": "text", "text": "the"}]}]
    whole = made.apply_chat_template(message, return_dict=False)
    assert Tokens(made, 512, True).ids(["the"], True) == [whole]


def test_a_date_in_a_template_is_always_the_same():
    today = (
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now( \"%B\" ) }} {{ messages[0]['content'] }}"
    )
    assert render_chat(tokenizer("bytes", today), answers=False).before == "01 Jan 2025 January "


@pytest.mark.parametrize(
    ("end", "closed"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>\n\n</think>\n\n"),
        ("[THINK]", "[THINK]\n\n[/THINK]\n\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<|channel|>x<|end|><|start|>assistant", None),
        ("Assistant:", "Assistant:"),
    ],
)
def test_a_thought_that_a_template_begins_is_closed_where_an_answer_is_wanted(end, closed):
    made = tokenizer("bytes", f"{{{{ messages[0]['content'] }}}}{{{{ {end!r} }}}}")
    assert render_chat(made, answers=False).after == end
    after = render_chat(made, answers=True).after
    assert after == (f"{end}<|channel|>final<|message|>" if closed is None else closed)


def test_the_hash_says_how_a_chat_is_tokenised():
    """Stores from before, of the same template tokenised in parts, are those of another job."""
    hashes = {kind: Tokens(tokenizer(kind), 512, True).chat_hash for kind in KINDS}
    assert hashes["bytes"] == hashes["always"] == hashes["never"] == hashes["unigram"]
    assert hashes["first"] != hashes["bytes"]


def test_a_tokenizer_written_in_python():
    made = ByT5Tokenizer(extra_ids=2)
    made.chat_template = "<extra_id_0>{{ messages[0]['content'] }}</s>"
    tokens = Tokens(made, 20, True)
    assert tokens.ids(["the", "Zoë"], True) == [applied(made, text) for text in ("the", "Zoë")]
    spelled, other = tokens.ids(["a</s>b<extra_id_0>", "a~~~~b~~~~~~~~~~~~"], False)
    assert len(spelled) == len(other)
    assert spelled.count(made.eos_token_id) == other.count(made.eos_token_id) == 1
    [long] = tokens.ids(["x" * 90], True)
    assert (len(long), long[-1]) == (20, made.eos_token_id)
    plain = Tokens(made, 20, False).ids(["a</s>b"], True)[0]
    assert plain.count(made.eos_token_id) == 1  # the one that the tokenizer puts at the end
