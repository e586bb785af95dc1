"""Generated pages: the tables of the configuration, and the commands.

`python -m docs.tools.generate` writes docs/reference/configuration.md (between its marks) and
docs/reference/commands.md anew; a test compares them with the code.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from launch.parser import build_parser
from trainer.config.run import RunConfig
from trainer.config.tables import Section

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
CONFIGURATION = REFERENCE / "configuration.md"
COMMANDS = REFERENCE / "commands.md"


def main() -> None:
    """Writes all generated pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Every generated page with its text, as the code has it now."""
    text = CONFIGURATION.read_text(encoding="utf-8")
    for name in sections():
        table = field_table(name)
        text = marks(name).sub(lambda m, table=table: m[1] + table + m[3], text)
    return {CONFIGURATION: text, COMMANDS: commands_page()}


# ---------------------------------------------------------------- configuration


def sections(model: type[Section] = RunConfig, prefix: str = "") -> dict[str, type[Section]]:
    """Every section of the configuration by its dotted name, the whole run being `run`."""
    by_name = {prefix.rstrip(".") or "run": model}
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            by_name |= sections(field.annotation, f"{prefix}{name}.")
        elif get_origin(field.annotation) is dict and _is_section(get_args(field.annotation)[1]):
            by_name |= sections(get_args(field.annotation)[1], f"{prefix}{name}.NAME.")
    return by_name


def field_table(name: str) -> str:
    """The Markdown table of one section, sections inside it left out."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for key, field in sections()[name].model_fields.items():
        if _is_section(field.annotation):
            continue
        default = "required"
        if field.default is not PydanticUndefined:
            value = yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]
            default = f"`{value}`"
        meaning = (field.description or "").replace("|", "\\|")
        words = type_words(field.annotation, field.metadata)
        lines.append(f"| `{key}` | {words} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def marks(name: str) -> re.Pattern[str]:
    """Where the table of a section stands in the page."""
    return re.compile(f"(<!-- table {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def type_words(annotation: Any, metadata: list[Any]) -> str:
    """A field's type and bounds in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_words(arguments[0], [])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return " or ".join([*(type_words(argument, metadata) for argument in rest), "`null`"])
    if get_origin(annotation) is list:
        filled = any(getattr(bound, "min_length", None) for bound in metadata)
        words = type_words(arguments[0], []).replace("integer", "integers")
        return f"list of {words}{', not empty' if filled else ''}"
    if get_origin(annotation) is dict:
        key, value = (type_words(argument, []) for argument in arguments)
        return f"mapping of {key} to {value}"
    signs = {"ge": "≥", "gt": ">", "lt": "<", "le": "≤", "multiple_of": "multiple of"}
    bounds = [
        f"{sign} {getattr(bound, key)}"
        for bound in metadata
        for key, sign in signs.items()
        if getattr(bound, key, None) is not None
    ]
    if _is_section(annotation):
        return "a section"
    words = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return " ".join([words[annotation], ", ".join(bounds)]).strip()


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


# ---------------------------------------------------------------- commands


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands right below a parser, by name; none of a command that does something itself."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def leaves(
    parser: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, as `knowledge extract`, in the order of the help."""
    for name, inner in subcommands(parser).items():
        if subcommands(inner):
            yield from leaves(inner, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", inner


def commands_page() -> str:
    """docs/reference/commands.md: what every command does, an example, and its options."""
    lines = [
        "# Commands",
        "",
        "`llm4msr` lies in `.venv/bin` after the set-up; `python -m launch` is the same. Every command",
        "explains itself with `--help`. This page is generated from the parser.",
        "",
        "Exit codes: 0 done, 2 wrong input (one message, no traceback), 1 a fault of the program, 130",
        "interrupted.",
        "",
        "| command | does |",
        "|---|---|",
    ]
    commands = dict(leaves(build_parser()))
    shared = _shared_options(list(commands.values()))
    for name, parser in commands.items():
        anchor = name.replace(" ", "-")
        lines.append(f"| [`{name}`](#{anchor}) | {_escaped(parser.description or '')} |")
    if shared:
        lines += ["", "## Options of every command", ""]
        lines += _option_table([shared[name] for name in shared])
    for name, parser in commands.items():
        example = str(parser.epilog).removeprefix("example: ")
        lines += ["", f"## {name}", "", _escaped(parser.description or ""), ""]
        lines += ["```sh", example, "```", ""]
        lines += _option_table([a for a in parser._actions if _name_of(a) not in shared])
    return "\n".join([*lines, ""])


def _shared_options(parsers: list[argparse.ArgumentParser]) -> dict[str, argparse.Action]:
    """The options that every command has with the same words, by name."""
    first = {_name_of(action): action for action in parsers[0]._actions if action.option_strings}
    return {
        name: action
        for name, action in first.items()
        if all((name, action.help) in _words_of(parser) for parser in parsers)
        and not isinstance(action, argparse._HelpAction)
    }


def _words_of(parser: argparse.ArgumentParser) -> set[tuple[str, str | None]]:
    return {(_name_of(action), action.help) for action in parser._actions}


def _name_of(action: argparse.Action) -> str:
    return ", ".join(action.option_strings) or action.dest


def _option_table(actions: list[argparse.Action]) -> list[str]:
    """The rows of a command's positional arguments and options, `--help` left out."""
    rows = ["| argument | meaning |", "|---|---|"]
    for action in actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        name = ", ".join(f"`{option}`" for option in action.option_strings)
        choices = "".join(f" `{choice}`" for choice in action.choices or ())
        values = f": one of{choices}" if choices else ""
        required = " (required)" if action.required and action.option_strings else ""
        help_text = _escaped((action.help or "").replace("%%", "%"))
        rows.append(f"| {name or f'`{_placeholder(action)}`'}{required} | {help_text}{values} |")
    return rows if len(rows) > 2 else []


def _placeholder(action: argparse.Action) -> str:
    shown = action.metavar or action.dest
    return " ".join(shown) if isinstance(shown, tuple) else str(shown)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
