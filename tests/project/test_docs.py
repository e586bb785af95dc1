"""What the pages promise: every field of the configuration, commands that parse, links that lead somewhere.

`python -m tests.project.test_docs` writes the tables of docs/configuration.md anew.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic_core import PydanticUndefined

from launch.parser import build_parser
from tests.helpers.paths import ROOT
from trainer.config.run import RunConfig, load_config
from trainer.config.tables import Section
from trainer.data.dataset import SPLITS
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.models.llm4msr import BACKBONES

CONFIGURATION = ROOT / "docs" / "configuration.md"
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


# ---------------------------------------------------------------- configuration


def sections(model: type[Section] = RunConfig, prefix: str = "") -> dict[str, type[Section]]:
    """Every section of the configuration by its dotted name, the whole run being `run`."""
    found = {prefix.rstrip(".") or "run": model}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= sections(field.annotation, f"{prefix}{name}.")
    return found


def type_words(annotation: Any, metadata: list[Any]) -> str:
    """A field's type and bounds in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_words(arguments[0], [])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if type(None) in arguments:
        rest = [one for one in arguments if one is not type(None)]
        return " or ".join([*(type_words(one, metadata) for one in rest), "`null`"])
    if get_origin(annotation) is list:
        filled = any(getattr(one, "min_length", None) for one in metadata)
        words = type_words(arguments[0], []).replace("integer", "integers")
        return f"list of {words}{', not empty' if filled else ''}"
    if get_origin(annotation) is dict:
        key, value = (type_words(one, []) for one in arguments)
        return f"mapping of {key} to {value}"
    signs = {"ge": "≥", "gt": ">", "lt": "<", "le": "≤", "multiple_of": "multiple of"}
    bounds = [
        f"{sign} {getattr(one, key)}"
        for one in metadata
        for key, sign in signs.items()
        if getattr(one, key, None) is not None
    ]
    words = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return " ".join([words[annotation], ", ".join(bounds)]).strip()


def table(name: str) -> str:
    """The Markdown table of one section, sections inside it left out."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for key, field in sections()[name].model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue
        shown = field.default
        default = "required"
        if shown is not PydanticUndefined:
            default = f"`{yaml.safe_dump(shown, default_flow_style=True).splitlines()[0]}`"
        meaning = (field.description or "").replace("|", "\\|")
        words = type_words(field.annotation, field.metadata)
        lines.append(f"| `{key}` | {words} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def marked(name: str) -> re.Pattern[str]:
    """Where the table of a section stands in the page."""
    return re.compile(f"(<!-- table {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("name", sections())
def test_configuration_page_lists_every_field_with_its_default(name: str) -> None:
    found = marked(name).findall(CONFIGURATION.read_text(encoding="utf-8"))
    assert [part for _, part, _ in found] == [table(name)], "run: python -m tests.project.test_docs"


def test_configuration_page_has_no_section_of_the_past() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert re.findall(r"<!-- table (\S+) -->", text) == list(sections()), (
        "give a new section its heading and its two marks, then run: python -m tests.project.test_docs"
    )


def test_every_field_has_a_meaning() -> None:
    for name, model in sections().items():
        for key, field in model.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                assert field.description, f"{name}.{key}"


def test_example_configurations_are_valid(tmp_path: Path) -> None:
    examples = [
        block
        for page in PAGES
        for language, block in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "yaml" and "backbone:" in block
    ]
    assert examples
    for block in examples:
        (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
        assert load_config(tmp_path / "run.yaml").model.backbone in BACKBONES


# ---------------------------------------------------------------- commands


def commands(page: Path) -> list[str]:
    """Lines of the page's code blocks that begin with `llm4msr` or `make`, continued lines joined."""
    found = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith(("llm4msr ", "make ")):
                    found.append(line)
    return found


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    lines = [line for line in commands(page) if line.startswith("llm4msr ")]
    assert lines or page != README
    for line in lines:
        try:
            words = shlex.split(line, comments=True)[1:]
            # What follows -- belongs to a stage, what follows | to another program.
            stop = min((words.index(mark) for mark in ("--", "|") if mark in words), default=None)
            options = build_parser().parse_args(words[:stop])
        except SystemExit as error:
            pytest.fail(f"{page.name}: does not parse ({error}): {line}")
        assert callable(options.run)


def help_examples(parser: argparse.ArgumentParser) -> list[str]:
    """The example of every command, in the order in which help lists them."""
    inner = [line for one in subcommands(parser).values() for line in help_examples(one)]
    return inner or [str(parser.epilog).removeprefix("example: ")]


def steps() -> list[str]:
    """The commands that README goes through MovieLens with."""
    [block] = [block for _, block in FENCE.findall(README.read_text()) if "--key" in block]
    return block.replace("\\\n", " ").splitlines()


LEVELS = ("user", "item", "scenario")
READS = ("data", "store", "stores", "config", "tables", "run_dir", "runs")


@pytest.mark.parametrize("lines", [help_examples(build_parser()), steps()], ids=["help", "readme"])
def test_examples_can_be_pasted_one_after_another(lines: list[str]) -> None:
    """Each reads what is shipped or what an earlier one wrote, and writes over no other's output."""
    made: set[Path] = set()
    runs: dict[Path, dict[str, Any]] = {}
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        cut = words.index("--") if "--" in words else len(words)
        options = build_parser().parse_args(words[:cut])
        if cut < len(words):  # the stage that is launched
            options = build_parser().parse_args([options.stage, *words[cut + 1 :]])
        given = {name: getattr(options, name, None) or [] for name in READS}
        paths = {name: one if isinstance(one, list) else [one] for name, one in given.items()}
        read = [path for each in paths.values() for path in each if isinstance(path, Path)]
        for path in paths["config"]:
            config = load_config(ROOT / path, options.set)
            knowledge = [getattr(config.knowledge, level) for level in LEVELS]
            read += map(Path, filter(None, [config.data.path, *knowledge]))
            if options.run.__name__ in ("train_runs", "run_pipeline"):
                output = Path(config.output)
                assert runs.setdefault(output, config.model_dump()) == config.model_dump(), line
                made.add(output)
        for path in read:
            assert path in made or (ROOT / path).is_file(), f"nothing has made {path}: {line}"
        # Toy Story; users are numbered otherwise in some copies of MovieLens.
        if getattr(options, "key", None) or getattr(options, "remove", None):
            assert options.store.name == "item", line
            assert "1" in (options.key if "key" in options else options.remove), line
        if out := getattr(options, "out", None):
            assert out not in made, f"{out} is there already: {line}"
            made.add(out)
            if options.run.__name__ == "extract":
                made |= {out / level for level in LEVELS}
            if options.run.__name__ == "run_quickstart":
                made |= {out / "runs" / name for name in ("star", "star+llm4msr")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for line in commands(page):
        if line.startswith("make "):
            words = shlex.split(line, comments=True)[1:]
            assert {word for word in words if "=" not in word} <= targets, line


def test_readme_lists_the_commands_that_exist() -> None:
    listed = re.findall(
        r"^\| `([a-z][a-z -]*?)(?: [A-Z<\[-].*?)?` \|", README.read_text(), re.MULTILINE
    )
    wanted: set[str] = set()
    for name, parser in subcommands(build_parser()).items():
        inner = subcommands(parser)
        wanted |= {f"{name} {word}" for word in inner} if inner else {name}
    assert {word for word in listed if word.split()[0] in subcommands(build_parser())} == wanted
    assert len(set(listed)) == len(listed) == len(wanted)


# ---------------------------------------------------------------- the reader's own log, links


def test_the_readmes_schema_prepares_a_log(tmp_path: Path) -> None:
    [schema] = [
        block
        for language, block in FENCE.findall(README.read_text(encoding="utf-8"))
        if language == "yaml" and "timestamp_unit" in block
    ]
    (tmp_path / "schema.yaml").write_text(schema, encoding="utf-8")
    rows = 200
    log = {
        "customer": [f"c{row % 7}" for row in range(rows)],
        "sku": [f"s{row % 11}" for row in range(rows)],
        "page": [("feed", "search")[row % 2] for row in range(rows)],
        "at": [1_760_000_000_000 + 60_000 * row for row in range(rows)],
        "clicked": [row % 3 == 0 for row in range(rows)],
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    items = {"sku": ["s1"], "title": ["A title"], "categories": ["Books|History"]}
    pq.write_table(pa.table(items), tmp_path / "catalogue.parquet")
    info = prepare_parquet(tmp_path / "log.parquet", tmp_path / "data", tmp_path / "schema.yaml")
    assert [info.rows[split] for split in SPLITS] == [80, 80, 20, 20]
    assert info.negative_name == yaml.safe_load(schema)["negative_name"]
    prepared = pq.read_table(tmp_path / "data" / "items.parquet").to_pylist()
    assert {"item_id": "s1", "title": "A title", "categories": ["Books", "History"]} in prepared


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(ROOT / link.split("#")[0]).resolve() for link in LINK.findall(README.read_text())}
    assert {page.resolve() for page in PAGES} - {README} <= linked


if __name__ == "__main__":
    page_text = CONFIGURATION.read_text(encoding="utf-8")
    for section in sections():
        new = table(section)
        page_text = marked(section).sub(lambda m, new=new: m[1] + new + m[3], page_text)
    CONFIGURATION.write_text(page_text, encoding="utf-8")
