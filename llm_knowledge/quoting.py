"""Text of users and items as data: one clean line, or a JSON string that nothing inside can close."""

from __future__ import annotations

import json
import unicodedata

MAX_TITLE_CHARS = 160
# Characters of format (Cf) reorder text, hide in it, or spell a text that only a model reads (tags).
# These two shape the words of some scripts, and emoji.
_JOINERS = "\u200c\u200d"
# What is left of a text may be blank all the same: fillers, variation selectors, an empty Braille cell.
# The queries of `profiles.queries` (`_UNSEEN`) see no more.
_BLANK = (
    f" {_JOINERS}\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)


def clean(text: str, limit: int = MAX_TITLE_CHARS) -> str:
    """One line of printable text: no control characters, single spaces, at most `limit` long.

    Line and paragraph separators count as white space. Removed are characters of format (but for the
    joiners of scripts and emoji), all tags, unpaired surrogates and private code points. A text of
    which nothing is seen is empty; a clipped one ends with an ellipsis.
    """
    text = " ".join(text[: 4 * limit].split())
    kept = text
    if not text.isprintable():  # most titles are: none of their characters is to be looked at
        kept = " ".join("".join(filter(_is_kept, text)).split())
    if not kept.strip(_BLANK):
        return ""
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def _is_kept(character: str) -> bool:
    if character in _JOINERS:
        return True
    category = unicodedata.category(character)
    # Unassigned characters may be letters of a newer Unicode, but not in the block of the tags.
    tag = category == "Cn" and "\U000e0000" <= character <= "\U000e0fff"
    return category not in ("Cc", "Cf", "Cs", "Co") and not tag


def quote(text: str, limit: int = MAX_TITLE_CHARS) -> str:
    """`clean` text as a JSON string: quotation marks and backslashes inside are escaped."""
    return json.dumps(clean(text, limit), ensure_ascii=False)
