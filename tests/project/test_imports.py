"""Dependencies point one way, and help needs none of the heavy ones."""

import ast
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.house import Tree, takes_whole_configuration
from tests.helpers.paths import ROOT

MAY_IMPORT = {
    "llm_knowledge": {"llm_knowledge"},
    "embeddings": {"embeddings"},
    "trainer": {"trainer", "embeddings", "llm_knowledge"},
    "launch": {"launch", "trainer", "embeddings", "llm_knowledge"},
}


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported_packages(file) & set(MAY_IMPORT) - MAY_IMPORT[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"
        assert "tests" not in imported_packages(file)


@pytest.mark.parametrize("package", ["llm_knowledge", "embeddings"])
def test_leaf_packages_avoid_each_others_heavy_parts(package: str) -> None:
    forbidden = {"llm_knowledge": {"torchrec", "fbgemm_gpu"}, "embeddings": {"transformers"}}[
        package
    ]
    for file in (ROOT / package).rglob("*.py"):
        assert not imported_packages(file) & forbidden, file


def modules() -> dict[str, Path]:
    """Every module of the four packages: dotted name to file."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in MAY_IMPORT
        for file in sorted((ROOT / package).rglob("*.py"))
    }


def imported_modules(file: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, inside of functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & known) or {str(node.module)}
    return names & known


def room_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of a directed graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        for following in sorted(arrows.get(node, ())):
            if found := visit(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := visit(node, []))), [])


def test_no_circle_of_modules() -> None:
    files = modules()
    arrows = {name: imported_modules(file, set(files)) - {name} for name, file in files.items()}
    assert circle_in(arrows) == []


def test_no_circle_of_rooms() -> None:
    files = modules()
    arrows: dict[str, set[str]] = {}
    for name, file in files.items():
        for other in imported_modules(file, set(files)):
            here, there = room_of(name, file), room_of(other, files[other])
            if here != there:
                arrows.setdefault(here, set()).add(there)
    assert len(arrows) > 20
    assert circle_in(arrows) == []


def test_rooms_are_small() -> None:
    files = [file for file in modules().values() if file.name != "__init__.py"]
    rooms = Counter(file.parent.relative_to(ROOT) for file in files)
    assert max(rooms.values()) <= 22, rooms.most_common(3)


def test_few_functions_take_the_whole_configuration() -> None:
    """What builds, saves or compares a run needs all of it; everything else takes sections or values."""
    takers = [
        function.name for function in Tree(ROOT).functions if takes_whole_configuration(function)
    ]
    assert "train" in takers  # it is counted as it should be
    assert len(takers) <= 15, takers


def test_the_formatter_formats_everything_in_trainer_embeddings_and_llm_knowledge() -> None:
    tree = Tree(ROOT)
    assert tree.skips("trainer", "embeddings", "llm_knowledge") == 0


def test_circles_are_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("words", [[], ["train"], ["knowledge", "extract"], ["quickstart"]])
def test_help_is_instant_and_shows_an_example(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launch", *words, "--help"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    seconds = time.perf_counter() - began
    assert done.returncode == 0
    assert "example: llm4msr" in done.stdout or "knowledge extract" in done.stdout
    heavy = {"torch", "transformers", "duckdb", "pyarrow", "matplotlib"}
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & heavy
    assert seconds < 5, "importtime slows it down; without it help takes about 0.15 s"


def test_every_process_group_says_how_long_it_waits() -> None:
    """A new group has torch's half hour otherwise, whatever the default group was given."""
    for package in MAY_IMPORT:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("dist.new_group"):
                    named = {keyword.arg for keyword in node.keywords}
                    assert "timeout" in named, f"{file.relative_to(ROOT)}:{node.lineno}"
