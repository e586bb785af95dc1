"""Prompts: versioned templates, hostile text quoted as data, a token budget that drops old items.

A prompt is `instruction` (the same for every row, so that it can be shared), then `body`, then
`closing`. Text from items and users enters either as JSON strings (`quoting: json`: nothing
inside can close the quotation mark or start a line) or, where there is no instruction to protect,
as bare lines (`quoting: line`: nothing inside can start a line).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_knowledge.errors import InputError
from llm_knowledge.quoting import MAX_TITLE_CHARS, clean, quote
from llm_knowledge.yaml_files import read_yaml

TEMPLATES = Path(__file__).parent / "templates"
# Raised where the code below makes another prompt of the same template and profile: a store, its dates and
# a refresh must not mix both. It enters the hash of every template; shipped ones get a new version, too.
RENDERING = 2
MAX_ITEM_CHARS = 500
# Of a category: a prompt names up to twelve, beside what it is about.
MAX_CATEGORY_CHARS, ITEM_CATEGORIES = 40, 8
# The budget takes so much of a title at a time.
ITEM_PIECE_CHARS = 20

_COMMON = {"scenario_names", "positive_name", "negative_name"}
_ALLOWED = {
    "instruction": {level: _COMMON for level in ("user", "scenario", "item")},
    "body": {
        "user": _COMMON | {"habit", "tastes", "sections", "liked", "disliked"},
        "scenario": _COMMON
        | {
            "name",
            "description",
            "activity",
            "top_categories",
            "distinct_categories",
            "relations",
        },
        "item": _COMMON | {"title", "categories", "title_or_categories", "title_and_categories"},
    },
    "section": {"user": {"scenario", "liked", "disliked"}},
    "liked": {"user": {"titles", "positive_name", "negative_name"}},
    "disliked": {"user": {"titles", "positive_name", "negative_name"}},
}
# Smallest share of items that were liked, and how a user of such a share is spoken of.
_HABITS = [
    (0.8, "nearly everything"),
    (0.6, "most"),
    (0.4, "about half"),
    (0.2, "little"),
    (0.0, "hardly anything"),
]


class Template(BaseModel):
    """One template file. `hash` covers every field and how it is rendered: any change is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int
    level: Literal["user", "scenario", "item"]
    quoting: Literal["json", "line"] = "json"
    instruction: str = ""
    body: str
    section: str = ""
    liked: str = ""
    disliked: str = ""
    title_separator: str = ", "
    empty: str
    closing: str = ""

    @property
    def hash(self) -> str:
        """Hex digest (32 characters) of the template's content and `RENDERING`."""
        fields = {**self.model_dump(), "rendering": RENDERING}
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def default_template(level: str, kind: str) -> str:
    """Name of the template for a level and a kind of model ("encoder" or "decoder")."""
    return level if kind == "decoder" else f"{level}_plain"


def load_template(name_or_path: str | Path, level: str) -> Template:
    """Loads a shipped template by name or any YAML file by path.

    Raises:
        InputError: not found, not YAML, unknown field or placeholder, or made for another level.
    """
    file = TEMPLATES / f"{name_or_path}.yaml"
    if not (isinstance(name_or_path, str) and name_or_path.isidentifier() and file.is_file()):
        file = Path(name_or_path)
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.yaml")))
        raise InputError(f"template {str(name_or_path)!r} is neither a file nor one of: {shipped}")
    try:
        template = Template.model_validate(read_yaml(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{file}: {where}: {first['msg']}") from error
    if template.level != level:
        raise InputError(f"{file}: level {template.level!r}, but {level!r} is to be extracted")
    if template.quoting == "line" and (template.instruction.strip() or template.closing.strip()):
        raise InputError(
            f"{file}: quoting: 'line' leaves titles unquoted, which is only safe "
            f"without instruction and closing; use 'json'"
        )
    for part, by_level in _ALLOWED.items():
        _check_placeholders(file, part, getattr(template, part), by_level.get(level, set()))
    for part in ("empty", "closing", "title_separator"):
        _check_placeholders(file, part, getattr(template, part), set())
    return template


def _check_placeholders(file: Path, part: str, text: str, allowed: set[str]) -> None:
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"{file}: {part}: {error}; write {{{{ and }}}} for braces") from error
    for _, name, spec, conversion in fields:
        if name is not None and (name not in allowed or spec or conversion):
            names = ", ".join(sorted(allowed)) or "none"
            raise InputError(f"{file}: {part}: unknown placeholder {{{name}}}; allowed: {names}")


def _fill(pattern: str, values: dict[str, str]) -> str:
    """A pattern with its placeholders filled, without the lines that stay empty then.

    So only blank lines of the pattern part paragraphs, and those of a value made of several: a line
    that has nothing to say makes none of the line behind it.
    """
    paragraphs: list[str] = []
    for part in pattern.split("\n\n"):
        filled = (line.format_map(values) for line in part.splitlines())
        paragraphs += "\n".join(text for text in filled if text.strip()).split("\n\n")
    stripped = (map(str.strip, paragraph.splitlines()) for paragraph in paragraphs)
    joined = ("\n".join(filter(None, lines)) for lines in stripped)
    return "\n\n".join(filter(None, joined))


@dataclass(frozen=True)
class Renderer:
    """Turns profile data into prompts of at most `max_tokens` tokens.

    Attributes:
        template: what to say.
        scenarios: scenario_id -> name and description, in the dataset's order.
        positive_name: word for label 1.
        negative_name: word for label 0, or None where absence means nothing.
        count_tokens: token numbers of texts, special tokens included.
        max_tokens: budget of one prompt.
    """

    template: Template
    scenarios: dict[Any, dict[str, str]]
    positive_name: str
    negative_name: str | None
    count_tokens: Callable[[Sequence[str]], Sequence[int]]
    max_tokens: int

    def render(self, data: Iterable[dict[str, Any]]) -> list[str]:
        """Prompts of profiles (`data` of `profiles.profile_batches`), each within the budget.

        What does not fit is dropped: of a user the oldest items; of a scenario the least related
        others, then categories; of an item categories, then the end of the title. The instruction,
        the closing, and a scenario's name and description are never cut.

        Raises:
            InputError: what is never cut is longer than the budget.
        """
        profiles = list(data)
        prompts = [self.text(profile) for profile in profiles]
        lengths = self.count_tokens(prompts)
        for row, length in enumerate(lengths):
            if length > self.max_tokens:
                prompts[row] = self._shorten(profiles[row])
        return prompts

    def _shorten(self, profile: dict[str, Any]) -> str:
        fits, too_many = 0, self.pieces(profile)
        best = self.text(profile, 0)
        need = self.count_tokens([best])[0]
        if need > self.max_tokens:
            raise self._too_long(profile, need)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            text = self.text(profile, middle)
            if self.count_tokens([text])[0] <= self.max_tokens:
                fits, best = middle, text
            else:
                too_many = middle
        return best

    def _too_long(self, profile: dict[str, Any], need: int) -> InputError:
        subject, without, remedy = f"template {self.template.name!r}", "any item", "raise it"
        if self.template.level == "scenario":  # of a user or an item nothing of its own is left
            keys = [
                key for key, facts in self.scenarios.items() if facts["name"] == profile["name"]
            ]
            subject = f"scenario {(keys or [profile['name']])[0]!r}: {subject}"
            without, remedy = "categories and relations", "shorten its description or raise it"
        elif self.template.level == "item":
            without = "title and categories"
        return InputError(
            f"{subject} needs {need} tokens without {without}, max_tokens is "
            f"{self.max_tokens}; {remedy}"
        )

    def pieces(self, profile: dict[str, Any]) -> int:
        """Number of pieces that the budget may drop from a profile."""
        return sum(map(len, self._pieces(profile)))

    def _pieces(self, profile: dict[str, Any], keep: int | None = None) -> list[list[Any]]:
        """What the budget may drop, in lists that it empties from the last one's end.

        Of a user: items. Of a scenario: top categories, distinct ones, others. Of an item: pieces of
        the title, categories. With `keep`, that many pieces are left.
        """
        if self.template.level == "user":
            lists = [profile["items"]]
        elif self.template.level == "scenario":
            top, distinct = profile["top_categories"], profile["distinct_categories"]
            lists = [self._names(top), self._names(distinct), profile["others"]]
        else:
            title = clean(profile["title"], MAX_ITEM_CHARS)
            starts = range(0, len(title), ITEM_PIECE_CHARS)
            lists = [
                [title[start : start + ITEM_PIECE_CHARS] for start in starts],
                self._names(profile["categories"][:ITEM_CATEGORIES]),
            ]
        if keep is None:
            return lists
        before = itertools.accumulate(map(len, lists), initial=0)
        return [
            pieces[: max(0, keep - count)] for pieces, count in zip(lists, before, strict=False)
        ]

    def _names(self, categories: list[str]) -> list[str]:
        """Categories as they are said, short; those of which nothing is seen are left out."""
        names = [clean(category, MAX_CATEGORY_CHARS) for category in categories]
        return [self._say(name) for name in names if name]

    def text(self, profile: dict[str, Any], keep: int | None = None) -> str:
        """The prompt of one profile with its first `keep` pieces (None: all)."""
        build = {"user": self._user, "scenario": self._scenario, "item": self._item}
        values = build[self.template.level](profile, keep)
        body = _fill(self.template.body, {**self._common, **values}) if values else ""
        return (
            self.template.instruction.format_map(self._common)
            + (body or self.template.empty)
            + self.template.closing
        )

    @functools.cached_property
    def _common(self) -> dict[str, str]:
        return {
            "scenario_names": ", ".join(self._say(s["name"]) for s in self.scenarios.values()),
            "positive_name": clean(self.positive_name),
            "negative_name": clean(self.negative_name or ""),
        }

    def _say(self, text: str, limit: int = MAX_TITLE_CHARS) -> str:
        return quote(text, limit) if self.template.quoting == "json" else clean(text, limit)

    def _user(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        [kept] = self._pieces(profile, keep)
        items = [dict(item, title=clean(item["title"])) for item in kept]
        items = [item for item in items if item["title"]]
        if not items:
            return {}
        sections = []
        for scenario, facts in self.scenarios.items():
            of_scenario = [item for item in items if item["scenario"] == scenario]
            if of_scenario and self.template.section:
                values = {"scenario": self._say(facts["name"]), **self._lists(of_scenario)}
                sections.append(_fill(self.template.section, values))
        return {
            "habit": self._habit(profile),
            "tastes": self._tastes(profile),
            "sections": "\n".join(filter(None, sections)),
            **self._lists(items),
        }

    def _habit(self, profile: dict[str, Any]) -> str:
        """How easily the user is pleased, in words: encoders read words better than numbers."""
        if not profile.get("met"):
            return ""
        share = (profile["liked"] + 1) / (profile["met"] + 2)
        words = next(words for least, words in _HABITS if share >= least)
        return f"{self._common['positive_name'].capitalize()} {words}."

    def _tastes(self, profile: dict[str, Any]) -> str:
        """Categories that the user likes more than others, and less: a paragraph each."""
        paragraphs = []
        for words, liked in (("Prefers", True), ("Not", False)):
            tastes = [t["category"] for t in profile.get("tastes", []) if t["liked"] is liked]
            names = self._names(tastes)
            paragraphs += [f"{words} {', '.join(names)}."] if names else []
        return "\n\n".join(paragraphs)

    def _lists(self, items: list[dict[str, Any]]) -> dict[str, str]:
        lists = {}
        for part, liked in (("liked", True), ("disliked", False)):
            titles = [self._say(item["title"]) for item in items if item["liked"] is liked]
            values = {**self._common, "titles": self.template.title_separator.join(titles)}
            text = getattr(self.template, part).format_map(values).strip("\n")
            lists[part] = text if titles else ""
        return lists

    def _item(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        pieces, names = self._pieces(profile, keep)
        title, categories = "".join(pieces).rstrip(), ", ".join(names)
        if not title and not categories:
            return {}
        shown = self._say(title, MAX_ITEM_CHARS)
        return {
            "title": shown,
            "categories": categories or "unknown",
            "title_or_categories": shown if title else categories,
            "title_and_categories": ": ".join(filter(None, [title and shown, categories])),
        }

    def _scenario(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        def named(start: str, names: list[str]) -> str:
            return f"{start}: {', '.join(names)}." if names else ""

        top, distinct, others = self._pieces(profile, keep)
        rate, positive = profile["rate"], self._common["positive_name"]
        activity = (
            f"{profile['events']} events of {profile['users']} users on {profile['items']} items"
        )
        share = "" if rate is None else f"; {rate:.0%} of the events are {positive}"
        return {
            "name": self._say(profile["name"]),
            "description": self._say(profile["description"], 600) if profile["description"] else "",
            "activity": f"{activity}{share}." if profile["events"] else "No events so far.",
            "top_categories": named(f"Most {positive} here", top),
            "distinct_categories": named(
                f"{positive.capitalize()} here more than elsewhere", distinct
            ),
            "relations": " ".join(self._relation(other) for other in others),
        }

    def _relation(self, other: dict[str, Any]) -> str:
        similar = other["category_similarity"]
        taste = "partly the same" if similar > 0.4 else "different"
        taste = "much the same" if similar > 0.8 else taste
        text = (
            f"{other['common_users']:.0%} of the users are also in {self._say(other['name'])}, "
            f"where the categories are {taste}"
        )
        agreement = other["agreement"]
        if agreement is not None:
            often = "usually" if agreement > 0.6 else "often" if agreement > 0.3 else "rarely"
            text += f"; who is easily pleased here is {often} easily pleased there"
        return text + "."
