"""Prompts: versioned templates, hostile text quoted as data, a token budget that drops old items.

A prompt is ``instruction`` (the same for every row, so that it can be shared), then ``body``, then
``closing``. Text from items and users enters either as JSON strings (``quoting: json``: nothing
inside can close the quotation mark or start a line) or, where there is no instruction to protect,
as bare lines (``quoting: line``: nothing inside can start a line).
"""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llm_knowledge.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
MAX_TITLE_CHARS, MAX_ITEM_CHARS = 160, 500
MAX_TASTE_CHARS = 40  # of a category among tastes, which the budget cannot shorten
# Pieces that the budget may take from a scenario or an item prompt, one after the other.
ITEM_PIECE_CHARS = 20

_COMMON = {"scenario_names", "positive_name", "negative_name"}
_ALLOWED = {
    "instruction": {level: _COMMON for level in ("user", "scenario", "item")},
    "body": {
        "user": _COMMON | {"habit", "tastes", "sections", "liked", "disliked"},
        "scenario": _COMMON | {"name", "description", "activity", "top_categories",
                               "distinct_categories", "relations"},
        "item": _COMMON | {"title", "categories", "title_or_categories", "title_and_categories"},
    },
    "section": {"user": {"scenario", "liked", "disliked"}},
    "liked": {"user": {"titles", "positive_name", "negative_name"}},
    "disliked": {"user": {"titles", "positive_name", "negative_name"}},
}  # fmt: skip
# Smallest share of items that were liked, and how a user of such a share is spoken of.
_HABITS = [(0.8, "nearly everything"), (0.6, "most"), (0.4, "about half"), (0.2, "little"),
           (0.0, "hardly anything")]  # fmt: skip
# Bidirectional overrides reorder what a reader sees; joiners of emoji and of scripts stay.
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str, limit: int = MAX_TITLE_CHARS) -> str:
    """One line of printable text: no control characters, single spaces, at most ``limit`` long.

    Line and paragraph separators count as white space; bidirectional overrides, unpaired surrogates
    and private code points are removed. A clipped text ends with an ellipsis.
    """
    text = " ".join(text[: 4 * limit].split())
    kept = text
    if not text.isprintable():  # most titles are: none of their characters is to be looked at
        kept = "".join(c for c in text if c not in _BIDI
                       and unicodedata.category(c) not in ("Cc", "Cs", "Co"))  # fmt: skip
        kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def quote(text: str, limit: int = MAX_TITLE_CHARS) -> str:
    """``clean`` text as a JSON string: quotation marks and backslashes inside are escaped."""
    return json.dumps(clean(text, limit), ensure_ascii=False)


class Template(BaseModel):
    """One template file. ``hash`` covers every field, so that any change of wording is seen."""

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
        """Hex digest (32 characters) of the template's content."""
        text = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def default_template(level: str, kind: str) -> str:
    """Name of the template for a level and a kind of model ("encoder" or "decoder")."""
    return level if kind == "decoder" else f"{level}_plain"


def load_template(name_or_path: str | Path, level: str) -> Template:
    """Load a shipped template by name or any YAML file by path.

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
        template = Template.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{file}: {where}: {first['msg']}") from error
    if template.level != level:
        raise InputError(f"{file}: level {template.level!r}, but {level!r} is to be extracted")
    if template.quoting == "line" and (template.instruction.strip() or template.closing.strip()):
        raise InputError(f"{file}: quoting: 'line' leaves titles unquoted, which is only safe "
                         f"without instruction and closing; use 'json'")  # fmt: skip
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
            raise InputError(f"{file}: {part}: unknown placeholder {{{name}}}; allowed: "
                             f"{', '.join(sorted(allowed)) or 'none'}")  # fmt: skip


@dataclass(frozen=True)
class Renderer:
    """Turns profile data into prompts of at most ``max_tokens`` tokens.

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
        """Prompts of profiles (``data`` of ``profiles.profile_batches``), each within the budget.

        What does not fit is dropped whole, oldest first (user), least related first (scenario),
        from the end (item title). The instruction and the closing are never cut.

        Raises:
            InputError: the template alone is longer than the budget.
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
            raise InputError(f"template {self.template.name!r} needs {need} tokens without any "
                             f"item, max_tokens is {self.max_tokens}; raise it")  # fmt: skip
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            text = self.text(profile, middle)
            if self.count_tokens([text])[0] <= self.max_tokens:
                fits, best = middle, text
            else:
                too_many = middle
        return best

    def pieces(self, profile: dict[str, Any]) -> int:
        """Number of pieces that the budget may drop from a profile."""
        if self.template.level == "user":
            return len(profile["items"])
        if self.template.level == "scenario":
            return len(profile["others"])
        return -(-len(clean(profile["title"], MAX_ITEM_CHARS)) // ITEM_PIECE_CHARS)

    def text(self, profile: dict[str, Any], keep: int | None = None) -> str:
        """The prompt of one profile with its first ``keep`` pieces (None: all)."""
        build = {"user": self._user, "scenario": self._scenario, "item": self._item}
        common = {
            "scenario_names": ", ".join(self._say(s["name"]) for s in self.scenarios.values()),
            "positive_name": self.positive_name,
            "negative_name": self.negative_name or "",
        }
        values = build[self.template.level](profile, keep)
        body = self.template.body.format_map({**common, **values}) if values else ""
        paragraphs = (
            "\n".join(line.strip() for line in part.splitlines() if line.strip())
            for part in body.split("\n\n")
        )
        body = "\n\n".join(part for part in paragraphs if part)
        return (
            self.template.instruction.format_map(common)
            + (body or self.template.empty)
            + self.template.closing
        )

    def _say(self, text: str, limit: int = MAX_TITLE_CHARS) -> str:
        return quote(text, limit) if self.template.quoting == "json" else clean(text, limit)

    def _user(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        items = [dict(item, title=clean(item["title"])) for item in profile["items"][:keep]]
        items = [item for item in items if item["title"]]
        if not items:
            return {}
        sections = []
        for scenario, facts in self.scenarios.items():
            mine = [item for item in items if item["scenario"] == scenario]
            if mine and self.template.section:
                sections.append(self.template.section.format_map(
                    {"scenario": self._say(facts["name"]), **self._lists(mine)}))  # fmt: skip
        return {
            "habit": self._habit(profile),
            "tastes": self._tastes(profile),
            "sections": "\n".join(sections),
            **self._lists(items),
        }

    def _habit(self, profile: dict[str, Any]) -> str:
        """How easily the user is pleased, in words: encoders read words better than numbers."""
        if not profile.get("met"):
            return ""
        share = (profile["liked"] + 1) / (profile["met"] + 2)
        words = next(words for least, words in _HABITS if share >= least)
        return f"{self.positive_name.capitalize()} {words}."

    def _tastes(self, profile: dict[str, Any]) -> str:
        """Categories that the user likes more than others, and less: a paragraph each."""
        found = []
        for words, liked in (("Prefers", True), ("Not", False)):
            tastes = [t["category"] for t in profile.get("tastes", []) if t["liked"] is liked]
            names = [clean(name, MAX_TASTE_CHARS) for name in tastes]
            said = ", ".join(self._say(name) for name in names if name)
            found += [f"{words} {said}."] if said else []
        return "\n\n".join(found)

    def _lists(self, items: list[dict[str, Any]]) -> dict[str, str]:
        names = {"positive_name": self.positive_name, "negative_name": self.negative_name or ""}
        out = {}
        for part, wanted in (("liked", True), ("disliked", False)):
            titles = [self._say(item["title"]) for item in items if item["liked"] is wanted]
            joined = self.template.title_separator.join(titles)
            pattern = getattr(self.template, part)
            out[part] = pattern.format_map({**names, "titles": joined}) if titles else ""
        return out

    def _item(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        title = clean(profile["title"], MAX_ITEM_CHARS)
        if keep is not None:
            title = title[: keep * ITEM_PIECE_CHARS].rstrip()
        names = [name for name in map(clean, profile["categories"][:8]) if name]
        categories = ", ".join(self._say(name) for name in names if keep != 0)
        if not title and not categories:
            return {}
        shown = self._say(title, MAX_ITEM_CHARS)
        return {"title": shown, "categories": categories or "unknown",
                "title_or_categories": shown if title else categories,
                "title_and_categories": ": ".join(filter(None, [title and shown, categories]))}  # fmt: skip

    def _scenario(self, profile: dict[str, Any], keep: int | None) -> dict[str, str]:
        def named(start: str, names: list[str]) -> str:
            return f"{start}: {', '.join(self._say(name) for name in names)}." if names else ""

        rate = profile["rate"]
        activity = (f"{profile['events']} events of {profile['users']} users on {profile['items']} "
                    f"items")  # fmt: skip
        share = "" if rate is None else f"; {rate:.0%} of the events are {self.positive_name}"
        others = profile["others"][:keep]
        return {
            "name": self._say(profile["name"]),
            "description": self._say(profile["description"], 600) if profile["description"] else "",
            "activity": f"{activity}{share}." if profile["events"] else "No events so far.",
            "top_categories": named(f"Most {self.positive_name} here", profile["top_categories"]),
            "distinct_categories": named(f"{self.positive_name.capitalize()} here more than elsewhere",
                                         profile["distinct_categories"]),
            "relations": " ".join(self._relation(other) for other in others),
        }  # fmt: skip

    def _relation(self, other: dict[str, Any]) -> str:
        similar = other["category_similarity"]
        taste = "much the same" if similar > 0.8 else "partly the same" if similar > 0.4 \
            else "different"  # fmt: skip
        text = (f"{other['common_users']:.0%} of the users are also in {self._say(other['name'])}, "
                f"where the categories are {taste}")  # fmt: skip
        agreement = other["agreement"]
        if agreement is not None:
            how = "usually" if agreement > 0.6 else "often" if agreement > 0.3 else "rarely"
            text += f"; who is easily pleased here is {how} easily pleased there"
        return text + "."
