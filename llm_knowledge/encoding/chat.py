"""A decoder's chat template around a text, and the token ids of both as one.

What the template writes steers the model; a text never does. Text and template are tokenised
together, as `apply_chat_template(tokenize=True)` does: many tokenizers treat the beginning of a
string in another way than its middle.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_knowledge.errors import InputError

# Stands for the text while the chat template is rendered; no template holds it.
_PLACE = "\u2042the text\u2042"
# Stand in a copy of the tokenizer for the template's tokens on either side of a text.
_LEFT, _RIGHT = "\u2042left\u2042", "\u2042right\u2042"
_STAND_INS = re.compile(f"{_LEFT}|{_RIGHT}")
# Templates that write the date of the day would make other vectors every day.
_DATE = datetime.datetime(2025, 1, 1)
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_VARIABLES = {"date_string": "01 Jan 2025", "enable_thinking": False, "thinking": False}
# A template that ends so has begun a thought, whatever it was told.
_OPEN_THOUGHT = re.compile(r"([<\[])(think|thinking|thought|reasoning)([>\]])\s*\Z", re.IGNORECASE)
# Models of OpenAI's harmony format choose a channel first: they think in one, and answer in another.
_HARMONY_END, _HARMONY_ANSWER = "<|start|>assistant", "<|channel|>final<|message|>"


@dataclass(frozen=True)
class ChatTemplate:
    """What a chat template writes around one user message.

    Attributes:
        before: text before the message.
        after: text behind it, up to where the answer begins.
        strips: whether white space at the message's ends is taken off.
    """

    before: str
    after: str
    strips: bool

    def around(self, text: str) -> str:
        """The text as the message of a whole chat."""
        return f"{self.before}{text.strip() if self.strips else text}{self.after}"


def render_chat(tokenizer: Any, answers: bool) -> ChatTemplate:
    """Renders a tokenizer's chat template around one user message, without thinking.

    Args:
        tokenizer: with a chat template.
        answers: whether the model goes on from it. Then a thought that the template begins in any
            case is closed, so that an answer's tokens do not go into it.

    Raises:
        InputError: the template cannot be applied to one user message, or changes it.
    """
    source = _TODAY.sub(
        lambda call: json.dumps(_DATE.strftime(call[2])), tokenizer.get_chat_template()
    )

    def render(text: str) -> str:
        # Templates of models that read images may take a message in parts only.
        parts = [{"type": "text", "text": text}]
        for content in (text, parts):
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=source,
                tokenize=False,
                add_generation_prompt=True,
                **_VARIABLES,
            )
            if _PLACE in rendered:
                break
        return rendered

    try:
        whole, spaced = render(_PLACE), render(f" {_PLACE} ")
    except Exception as error:  # the template is a program of the model's author
        raise InputError(
            f"the model's chat template cannot be applied to one user message "
            f"({error}); use --chat-template off"
        ) from error
    if whole.count(_PLACE) != 1:
        raise InputError(
            "the model's chat template does not hold the user message once, as it "
            "stands; use --chat-template off"
        )
    before, _, after = whole.partition(_PLACE)
    if answers:
        after += _end_of_thought(after, source)
    return ChatTemplate(before, after, strips=spaced == whole)


def _end_of_thought(after: str, source: str) -> str:
    """What closes the thought that the end of a chat begins, or lets a model begin to answer."""
    if thought := _OPEN_THOUGHT.search(after):
        opened, name, closed = thought.groups()
        return f"{'' if after.endswith(chr(10)) else chr(10)}\n{opened}/{name}{closed}\n\n"
    if after.endswith(_HARMONY_END) and "<|channel|>" in source:
        return _HARMONY_ANSWER
    return ""


class ChatTokens:
    """Texts within a chat template to token ids.

    Control tokens are the tokenizer's special tokens and added tokens that the template names. Where a
    text spells one, it is tokenised as the letters that it is made of.

    Attributes:
        template: what stands around every text.
        hash: hex digest of it, and of how it is tokenised.
    """

    def __init__(self, tokenizer: Any, answers: bool) -> None:
        """Renders the tokenizer's chat template; see `render_chat`."""
        self.tokenizer, self.template = tokenizer, render_chat(tokenizer, answers)
        added = tokenizer.added_tokens_decoder
        source = tokenizer.get_chat_template()
        self._controls = {
            number: token
            for number, token in added.items()
            if token.special or (token.content in source and not token.content.isspace())
        }
        self._spelled = _any_of(token.content for token in self._controls.values())
        self._of_template = self._count(self._encode([self.template.around("")])[0])
        self.hash = self._hash()

    def _hash(self) -> str:
        before, after = self.template.before, self.template.after
        hashed, probe = f"{before}\0{after}", "You are asked"
        parts = [self._encode([part])[0] if part else [] for part in (before, probe, after)]
        if [*parts[0], *parts[1], *parts[2]] != self._encode([f"{before}{probe}{after}"])[0]:
            # Once the parts were tokenised apart: stores of these vectors must not go on from those.
            hashed += "\0tokenised as one"
        return hashlib.blake2b(hashed.encode(), digest_size=16).hexdigest()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole chats, those of `apply_chat_template` with each text as the message."""
        chats = self._encode([self.template.around(text) for text in texts])
        for row, text in enumerate(texts):
            if self._spelled.search(text) or self._count(chats[row]) != self._of_template:
                chats[row] = self._ids_spelled(text)
        return chats

    def cut(self, text: str, limit: int) -> list[int]:
        """Ids of the chat of as much of a text's beginning as `limit` tokens hold.

        Raises:
            InputError: the template alone is longer.
        """
        least = self.ids([""])[0]
        if len(least) > limit:
            raise InputError(
                f"max_tokens: the model's chat template alone takes {len(least)} tokens, max_tokens "
                f"is {limit}; raise it"
            )
        fits, too_long = 0, max(1, limit)
        while too_long < len(text) and len(ids := self.ids([text[:too_long]])[0]) <= limit:
            fits, least, too_long = too_long, ids, 2 * too_long
        too_long = min(too_long, len(text) + 1)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(ids := self.ids([text[:middle]])[0]) <= limit:
                fits, least = middle, ids
            else:
                too_long = middle
        return least

    def _encode(self, chats: list[str]) -> list[list[int]]:
        return self.tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"]

    def _count(self, ids: list[int]) -> int:
        unknown = self.tokenizer.unk_token_id  # stands for a letter that the vocabulary lacks
        return sum(token in self._controls and token != unknown for token in ids)

    def _ids_spelled(self, text: str) -> list[int]:
        """As `ids`, of a text that spells a control token."""
        parts = self._divided
        text = text.strip() if self.template.strips else text
        between = parts.tokenizer(
            f"{parts.lead}{_STAND_INS.sub('', text)}{parts.trail}",
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        between = [token for token in between if token not in parts.stand_ins]
        unknown = parts.tokenizer.unk_token_id
        return parts.head + without_controls(between, self._controls, unknown) + parts.tail

    @functools.cached_property
    def _divided(self) -> _Divided:
        """The chat divided at the template's added tokens next to the text.

        A tokenizer divides there itself, before anything else, so that the parts may be tokenised
        apart. In a copy of it two tokens of no other meaning stand for those two, which keeps what is
        between them from being the beginning of a string.
        """
        before, after = self.template.before, self.template.after
        added = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        pattern = _any_of(added)
        left, right = list(pattern.finditer(before))[-1:], list(pattern.finditer(after))[:1]
        start = left[0].end() if left else 0
        stop = right[0].start() if right else len(after)
        parts = (before[:start], after[stop:])
        head, tail = (self._encode([part])[0] if part else [] for part in parts)
        lead, trail = before[start:], after[:stop]
        if not self.tokenizer.is_fast:  # such a one divides nothing where it splits special tokens
            return _Divided(self.tokenizer, head, lead, trail, tail, frozenset())
        tokenizer = copy.deepcopy(self.tokenizer)
        named = {
            name: added[match[0].group()]
            for name, match in ((_LEFT, left), (_RIGHT, right))
            if match
        }
        tokenizer.add_tokens([_like(token, name, special=False) for name, token in named.items()])
        tokenizer.add_tokens(
            [
                _like(token, token.content, special=True)
                for token in self._controls.values()
                if not token.special
            ]
        )
        return _Divided(
            tokenizer,
            head,
            f"{_LEFT if left else ''}{lead}",
            f"{trail}{_RIGHT if right else ''}",
            tail,
            frozenset(tokenizer.convert_tokens_to_ids(list(named))),
        )


@dataclass(frozen=True)
class _Divided:
    """A chat in three parts: up to the last added token before the text, between, and the rest.

    Attributes:
        tokenizer: for what is between.
        head, tail: token ids of the first and the last part.
        lead, trail: what stands around the text in between.
        stand_ins: ids of the tokens that stand for the parts left and right.
    """

    tokenizer: Any
    head: list[int]
    lead: str
    trail: str
    tail: list[int]
    stand_ins: frozenset[int]


def _like(token: Any, content: str, special: bool) -> Any:
    """An added token that takes white space and words as another one does."""
    from transformers import AddedToken

    return AddedToken(
        content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized if special else False,
        special=special,
    )


def without_controls(ids: list[int], controls: Iterable[int], unknown: int | None) -> list[int]:
    """Ids of a text with every control token in them made an unknown one, or left out.

    Some vocabularies (Unigram) hold control tokens as words, and find them in a text though its special
    tokens are to be split.
    """
    forged = set(controls) - {unknown}
    if forged.isdisjoint(ids):
        return ids
    changed = (unknown if token in forged else token for token in ids)
    return [token for token in changed if token is not None]


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some strings, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")
