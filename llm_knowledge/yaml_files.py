"""YAML that people write by hand: a key counts once, and a word is a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llm_knowledge.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: only true and false are booleans; 24:30:00, 2024-01-01 and 005 are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, yaml.Mark] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                f"the key {key!r} of line {seen[key].line + 1}",
                node.start_mark,
                "stands here again; one of them would be ignored",
                key_node.start_mark,
            )
        seen[key] = key_node.start_mark
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


class _GroupedDigitsLoader(_Loader):
    """Takes 100_000_000 for a number, too, as YAML 1.1 did; where ids may stand, it is a word."""


_GroupedDigitsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[1-9][0-9_]*$"), list("-+123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that one of the two rules of YAML would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_GroupedDigitsLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {
            *yaml.SafeDumper.yaml_implicit_resolvers,
            *_GroupedDigitsLoader.yaml_implicit_resolvers,
        }
    }


def dump_yaml(document: Any) -> str:
    """Writes a document so that `read_yaml`, and every other reader, reads the same values."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


def read_yaml(file: Path, what: str = "file", grouped_digits: bool = False) -> Any:
    """Reads a YAML file.

    Args:
        file: the file.
        what: what it is, for messages: "schema file".
        grouped_digits: whether 100_000 is a number; for files in which no ids stand.

    Raises:
        InputError: It is absent, no regular file, no UTF-8 or no YAML, or gives a key twice.
    """
    if not file.exists():
        raise InputError(f"{file}: no such {what}")
    if not file.is_file():
        raise InputError(f"{file}: is no regular file; give a {what} in YAML")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as YAML: {error}") from None
    return parse_yaml(text, str(file), grouped_digits)


def parse_yaml(text: str, source: str, grouped_digits: bool = False) -> Any:
    """Reads YAML from text.

    Args:
        text: one document.
        source: where it stands, for messages.
        grouped_digits: whether 100_000 is a number.

    Raises:
        InputError: It is no YAML, gives a key twice, or holds text that no file name can hold.
    """
    try:
        document = yaml.load(text, _GroupedDigitsLoader if grouped_digits else _Loader)
        _check_texts(document, "", set())
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise InputError(
            f"{source}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    except RecursionError:
        raise InputError(f"{source}: cannot be read as YAML: nested too deeply") from None
    return document


def _check_texts(value: Any, key: str, seen: set[int]) -> None:
    """Refuses text with a NUL or half a character, at which the system would stumble later."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{key or 'the text'}: {value!r} holds what no file name can hold")
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in pairs:
            _check_texts(name, key, seen)
            _check_texts(part, f"{key}.{name}".removeprefix("."), seen)
