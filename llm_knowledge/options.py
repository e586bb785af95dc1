"""Options of commands, declared once: a typed model gives the command line, its help and the checks."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from llm_knowledge.errors import InputError


class Options(BaseModel):
    """What a command is told. A subclass declares each option as a field with a type and a description.

    Raises:
        InputError: A value is of another type or out of bounds; names the option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError("\n".join(_problem(type(self), p) for p in error.errors())) from None

    @classmethod
    def parsed(cls, options: argparse.Namespace) -> Self:
        """What parsed options say; those that the parser has not keep their default."""
        return cls(**{name: getattr(options, name) for name in cls.model_fields if name in options})

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed, checked like any other."""
        return type(self)(
            **{name: getattr(self, name) for name in type(self).model_fields} | changes
        )


def option(
    default: Any,
    description: str,
    *,
    name: str | None = None,
    positional: bool = False,
    metavar: str | tuple[str, ...] | None = None,
    **bounds: Any,
) -> Any:
    """A field of `Options`.

    Args:
        default: `...` where the option must be given.
        description: Its help.
        name: On the command line, as `--compile`; default: the field's. A field that is true by default is
            switched off by it.
        positional: Without a name.
        metavar: As for argparse.
        bounds: As for `pydantic.Field`.
    """
    shown: Any = {"name": name, "positional": positional, "metavar": metavar}
    return Field(default, description=description, json_schema_extra={"shown": shown}, **bounds)


def add_options(
    parser: argparse.ArgumentParser, model: type[Options], names: Iterable[str] | None = None
) -> None:
    """Adds the fields of a model to a parser, what must be given first.

    Fields without a description are no options.

    Args:
        parser: The parser.
        model: The model.
        names: Some of its fields; default: all.
    """
    fields = model.model_fields
    for field in sorted(names or fields, key=lambda field: not fields[field].is_required()):
        about = fields[field]
        if about.description is None:
            continue
        shown = _shown(about)
        settings = _settings(about) | {"help": about.description}
        if shown["metavar"] is not None:
            settings["metavar"] = shown["metavar"]
        if shown["positional"]:
            parser.add_argument(field, **settings)
            continue
        if about.is_required():
            settings["required"] = True
        else:
            settings["default"] = list(about.default) if about.default == () else about.default
        name = shown["name"] or option_name(field)
        parser.add_argument(name, dest=field, **settings)


def option_name(field: str) -> str:
    """A field's name on the command line, unless it says another."""
    return f"--{field.replace('_', '-')}"


def _shown(about: FieldInfo) -> dict[str, Any]:
    """What `option` was told of a field's place on the command line."""
    extra: Any = about.json_schema_extra
    return extra["shown"] if extra else {"name": None, "positional": False, "metavar": None}


def _settings(about: FieldInfo) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    annotation = about.annotation
    optional = type(None) in get_args(annotation)
    if optional:
        assert get_origin(annotation) in (Union, types.UnionType)
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    if annotation is bool:
        if optional:
            return {"action": argparse.BooleanOptionalAction}
        return {"action": "store_false" if about.default else "store_true"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        if get_origin(inner) is tuple:  # pairs, one per occurrence
            return {"nargs": len(get_args(inner)), "action": "append", "type": get_args(inner)[0]}
        return {"nargs": "+", "type": inner}
    return {"type": annotation} if annotation in (int, float, Path) else {}


def _problem(model: type[Options], problem: Any) -> str:
    field = str(problem["loc"][0])
    about = model.model_fields.get(field)
    if about is None:
        return f"{field}: there is no such option"
    shown = _shown(about)
    name = field if shown["positional"] else shown["name"] or option_name(field)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name} {problem['input']!r}: {message}"
