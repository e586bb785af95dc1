"""Options of a command are declared once, by a model."""

import argparse
from pathlib import Path
from typing import Literal

import pytest

from launch.arguments import CommandParser
from launch.parser import build_parser
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import MODEL_FIELDS, ExtractConfig
from llm_knowledge.options import Options, add_options, option
from llm_knowledge.store.manifest import ProfileInfo


class Example(Options):
    """One option of each kind."""

    source: Path = option(..., "what is read", positional=True)
    out: Path = option(..., "what is written")
    kind: Literal["a", "b"] = option("a", "of it")
    count: int | None = option(None, "how many", gt=0)
    words: tuple[str, ...] = option((), "some")
    pairs: tuple[tuple[Path, Path], ...] = option((), "two each", metavar=("OLD", "NEW"))
    quick: bool = option(False, "be quick")
    careful: bool = option(True, "be careless", name="--careless")
    scaled: bool | None = option(None, "or as usual")
    inner: int = 3


def parse(*words: str) -> Example:
    parser = CommandParser(exit_on_error=False)
    add_options(parser, Example)
    return Example.parsed(parser.parse_args(words))


def test_a_command_line_is_read_as_the_model_says() -> None:
    assert parse("here", "--out", "there") == Example(source=Path("here"), out=Path("there"))
    words = "here --out there --kind b --count 2 --words x y --words z --quick --careless"
    read = parse(*words.split(), "--no-scaled", "--pairs", "1", "2", "--pairs", "3", "4")
    assert read.model_dump() == {
        "source": Path("here"),
        "out": Path("there"),
        "kind": "b",
        "count": 2,
        "words": ("x", "y", "z"),
        "pairs": ((Path("1"), Path("2")), (Path("3"), Path("4"))),
        "quick": True,
        "careful": False,
        "scaled": False,
        "inner": 3,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, r"^--count 0: input should be greater than 0$"),
        ({"kind": "c"}, r"^--kind 'c': input should be 'a' or 'b'$"),
        ({"careful": "perhaps"}, r"^--careless 'perhaps': "),
        ({"source": 5}, r"^source 5: "),
        ({"counts": 1}, r"^counts: there is no such option$"),
    ],
)
def test_a_wrong_value_is_one_message_that_names_the_option(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Example(**{"source": Path("here"), "out": Path("there"), **changes})
    with pytest.raises(InputError, match=message):
        Example(source=Path("here"), out=Path("there")).replace(**changes)


def test_what_is_not_described_is_no_option() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    assert "--inner" not in parser.format_help()


def test_fields_elsewhere_are_those_of_the_model() -> None:
    """What names the model again, and what a manifest keeps of profiles."""
    fields = ExtractConfig.model_fields
    assert {*MODEL_FIELDS, *ProfileInfo.model_fields} <= fields.keys()
    words = ["knowledge", "extract", "--data", "d", "--out", "o"]
    parsed = build_parser().parse_args(words)
    assert ExtractConfig.parsed(parsed) == ExtractConfig(data=Path("d"), out=Path("o"))
