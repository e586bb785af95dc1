"""Dependencies point one way, and help needs none of the heavy ones."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("words", [[], ["train"], ["knowledge", "extract"], ["quickstart"]])
def test_help_is_instant_and_shows_an_example(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launch", *words, "--help"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    seconds = time.perf_counter() - began
    assert done.returncode == 0
    assert "example: llm4msr" in done.stdout or "knowledge extract" in done.stdout
    heavy = {"torch", "transformers", "duckdb", "pyarrow", "matplotlib", "pydantic"}
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & heavy
    assert seconds < 5, "importtime slows it down; without it help takes about 0.1 s"
