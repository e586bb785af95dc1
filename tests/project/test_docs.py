"""What the pages promise: generated tables, commands that parse, links and paths that exist, sizes."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from docs.tools.generate import leaves, marks, pages, sections
from docs.tools.pictures import PICTURES
from launch.parser import build_parser
from tests.helpers.paths import ROOT
from trainer.config.run import load_config
from trainer.data.dataset import SPLITS
from trainer.data.sources.log_schema import LogSchema
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.models import BACKBONES

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REGENERATE = "run: python -m docs.tools.generate"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ---------------------------------------------------------------- generated pages


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_pages_are_those_of_the_code(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], REGENERATE


def test_configuration_page_has_a_table_of_every_section_and_no_other() -> None:
    text = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- table (\S+) -->", text) == list(sections()), (
        f"give a new section its heading and its two marks, then {REGENERATE}"
    )
    assert all(len(marks(name).findall(text)) == 1 for name in sections())


def test_every_field_has_a_meaning() -> None:
    for name, model in sections().items():
        for key, field in model.model_fields.items():
            assert key in sections() or f"{name}.{key}" in sections() or field.description, (
                f"{name}.{key}"
            )


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
    lines = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith(("llm4msr ", "make ")):
                    lines.append(line)
    return lines


@each_page
def test_commands_parse(page: Path) -> None:
    for line in commands(page):
        if not line.startswith("llm4msr "):
            continue
        try:
            words = shlex.split(line, comments=True)[1:]
            # What follows -- belongs to a stage, what follows | to another program.
            stop = min((words.index(mark) for mark in ("--", "|") if mark in words), default=None)
            options = build_parser().parse_args(words[:stop])
        except SystemExit as error:
            pytest.fail(f"{page.name}: does not parse ({error}): {line}")
        assert callable(options.run)


def test_readme_names_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in commands(README)][:2] == [
        "make quickstart",
        "make test",
    ]


def help_examples() -> list[str]:
    """The example of every command, in the order in which help lists them."""
    examples = [parser.epilog for _, parser in leaves(build_parser())]
    return [str(example).removeprefix("example: ") for example in examples]


def first_run_steps() -> list[str]:
    """The commands that the first tutorial goes through MovieLens with."""
    page = ROOT / "docs/tutorials/first-run.md"
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    [block] = [block for _, block in blocks if "--key" in block]
    return block.replace("\\\n", " ").splitlines()


LEVELS = ("user", "item", "scenario")
READS = ("data", "store", "stores", "config", "tables", "run_dir", "runs")


@pytest.mark.parametrize("lines", [help_examples(), first_run_steps()], ids=["help", "first run"])
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


@each_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for line in commands(page):
        if line.startswith("make "):
            words = shlex.split(line, comments=True)[1:]
            assert {word for word in words if "=" not in word} <= targets, line


# ---------------------------------------------------------------- the reader's own log


def test_the_tutorials_schema_prepares_a_log(tmp_path: Path) -> None:
    page = ROOT / "docs/tutorials/own-log.md"
    [schema] = [
        block
        for language, block in FENCE.findall(page.read_text(encoding="utf-8"))
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


def test_the_tutorials_variants_of_the_schema_are_valid() -> None:
    """Each later block of the page, laid over the first one."""
    text = (ROOT / "docs/tutorials/own-log.md").read_text(encoding="utf-8")
    whole, *variants = [
        yaml.safe_load(block) for language, block in FENCE.findall(text) if language == "yaml"
    ]
    del whole["negative_name"]
    assert variants
    for variant in variants:
        fields = {
            key: {**whole.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in variant.items()
        }
        assert LogSchema.model_validate({**whole, **fields}).negative_name is None


# ---------------------------------------------------------------- links, paths, functions


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def targets_of(page: Path) -> dict[str, Path]:
    """The relative links of a page, each with the file that it names."""
    links = [link for link in LINK.findall(without_code(page)) if "://" not in link]
    return {
        link: (page.parent / link.split("#")[0]).resolve() if link[0] != "#" else page
        for link in links
    }


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link, target in targets_of(page).items():
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor := link.partition("#")[2]:
            headings = re.findall(r"^#+ (.*)$", without_code(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [p for p in targets_of(page).values() if p in PAGES and p not in reached]
    assert reached == set(PAGES)


def test_every_page_stands_in_the_sites_navigation() -> None:
    """`make docs` is strict: a page that the navigation lacks would stop it."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries = re.findall(r"[\w-]+(?:/[\w-]+)*\.md", text.split("\nnav:")[1])
    folder = ROOT / "docs"
    inside = {page.relative_to(folder).as_posix() for page in folder.rglob("*.md")}
    assert inside <= set(entries)
    assert all(page in inside or page.startswith("reference/api/") for page in entries)


PATH = re.compile(
    r"`((?:trainer|embeddings|llm_knowledge|launch|tests|benchmarks|docs|requirements)/[\w./-]*)`"
)
MODULE = re.compile(
    r"python -m ((?:trainer|embeddings|llm_knowledge|launch|tests|benchmarks|docs)[\w.]*)"
)


@each_page
def test_paths_that_are_named_exist(page: Path) -> None:
    """Rooms move; a page that still names the old one sends its reader nowhere."""
    if page.name == "CHANGELOG.md":
        return  # tells of what was
    for path in PATH.findall(without_code(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    for module in MODULE.findall(page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page.name}: {module}"


@cache
def definitions_of(file: Path) -> set[str]:
    return set(definitions(ast.parse(file.read_text(encoding="utf-8")).body))


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Names of functions, classes and methods of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")


def test_functions_of_the_walks_exist() -> None:
    text = (ROOT / "docs/explain/architecture.md").read_text(encoding="utf-8")
    walks = text.split("## Three walks")[1].split("\n## ")[0]
    names = re.findall(r"`((?:trainer|embeddings|llm_knowledge|launch)\.[\w.]+)`", walks)
    assert len(names) > 30
    for name in names:
        parts = name.split(".")
        files = [ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in range(1, len(parts))]
        [(n, file)] = [(n, file) for n, file in enumerate(files, 1) if file.is_file()]
        assert ".".join(parts[n:]) in definitions_of(file), f"a walk names {name}"


# ---------------------------------------------------------------- sizes


def prose(page: Path) -> str:
    """A page without code, tables, headings, comments and the targets of links."""
    text = re.sub(r"<!--.*?-->", "", without_code(page), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    skipped = re.compile(r" {4}|\s*[|#<]|\s*!\[")  # code, tables, headings, pictures
    lines = [line for line in text.splitlines() if not skipped.match(line)]
    return "\n".join(lines)


def sentences(page: Path) -> list[str]:
    """The sentences of a page's prose; an item of a list ends one."""
    paragraphs = re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", prose(page))
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [s for paragraph in joined for s in re.split(r"(?<=[.:;?!])\**\s+", paragraph) if s]


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


@each_page
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 500


@each_page
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in sentences(page) if len(sentence.split()) > 25]
    assert not long, "a sentence has at most 25 words"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_their_script(name: str) -> None:
    drawn = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == PICTURES[name]().svg(), "run: python -m docs.tools.pictures"
    assert "prefers-color-scheme: dark" in drawn
