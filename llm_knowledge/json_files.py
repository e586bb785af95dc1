"""JSON that a program wrote and anybody may have damaged: read whole, or refused with one message."""

import json
from pathlib import Path
from typing import Any

from llm_knowledge.errors import InputError


def read_json(
    file: Path, fields: dict[str, type | tuple[type, ...]], remedy: str
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        file: The file.
        fields: Names that it must have, with the types of their values.
        remedy: What to do where the file is damaged, for the message.

    Raises:
        InputError: It is absent, no regular file (a pipe would never end), no UTF-8 or no JSON, or a field
            is missing or of another type.
    """
    if not file.is_file():
        what = "is no regular file" if file.exists() else "is missing"
        raise InputError(f"{file}: {what}; {remedy}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{file}: cannot be read as JSON ({reason}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: is {type(content).__name__}, must be an object; {remedy}")
    for name, kind in fields.items():
        value = content.get(name)
        # JSON's true is no number, though Python's is.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            what = f"is {value!r}" if name in content else "is missing"
            raise InputError(f"{file}: field {name!r} {what}; {remedy}")
    return content
