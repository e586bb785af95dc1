"""Counts of the source tree, side by side: files and rooms, imports, functions, words of the pages.

python -m benchmarks.house OLD NEW    two checkouts; prints a Markdown table
"""

import argparse
import ast
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

PACKAGES = ("launch", "trainer", "embeddings", "llm_knowledge")
LONG = 60  # lines of a function
SKIP = "# fmt: " + "skip"  # in two pieces, or this line would count


class Tree:
    """The source files of a checkout, parsed.

    Args:
        root: Folder of the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
        self.modules = {self._name(path): ast.parse(path.read_text("utf-8")) for path in files}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    def _is_package(self, module: str) -> bool:
        return (self.root / module.replace(".", "/")).is_dir()

    def room(self, module: str) -> str:
        """The folder of a module, as `trainer/data/loading`."""
        parts = module.split(".")
        return "/".join(parts if self._is_package(module) else parts[:-1])

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules of ours that each one imports, inside functions too, itself left out."""
        return {name: set(self._imported(name, tree)) for name, tree in self.modules.items()}

    def _imported(self, module: str, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.modules else node.module for name in inner]
            yield from (name for name in names if name in self.modules and name != module)

    @cached_property
    def room_arrows(self) -> dict[str, set[str]]:
        """The rooms that each room imports."""
        arrows: dict[str, set[str]] = {self.room(module): set() for module in self.modules}
        for module, others in self.imports.items():
            arrows[self.room(module)] |= {self.room(other) for other in others}
        return {room: others - {room} for room, others in arrows.items()}

    @property
    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method."""
        for tree in self.modules.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield node

    def skips(self, *folders: str) -> int:
        """How often the formatter is told to skip something in these folders."""
        files = [path for folder in folders for path in (self.root / folder).rglob("*.py")]
        return sum(path.read_text("utf-8").count(SKIP) for path in files)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of a graph that have more than one member, sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    parts: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            parts.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return sorted(part for part in parts if len(part) > 1)


def takes_whole_configuration(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a parameter is annotated with `RunConfig`."""
    arguments = function.args
    annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return any(a.annotation and "RunConfig" in ast.unparse(a.annotation) for a in annotated)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _files_per_room(tree: Tree) -> str:
    rooms = [tree.room(module) for module in tree.modules if not tree._is_package(module)]
    counts = {room: rooms.count(room) for room in set(rooms)}
    largest = max(counts, key=lambda room: counts[room])
    return f"{len(rooms) / len(counts):.1f} in the mean, at most {counts[largest]} (`{largest}`)"


def _words(*paths: Path) -> int:
    return sum(len(path.read_text("utf-8").split()) for path in paths)


COUNTS: dict[str, Callable[[Tree], object]] = {
    "files, without `__init__.py`": lambda t: sum(not t._is_package(m) for m in t.modules),
    "rooms that hold files": lambda t: len(t.room_arrows),
    "files per room": _files_per_room,
    "arrows between rooms": lambda t: sum(map(len, t.room_arrows.values())),
    "circles between rooms": lambda t: len(circles(t.room_arrows)),
    "circles between modules": lambda t: len(circles(t.imports)),
    f"`{SKIP}` in the packages": lambda t: t.skips(*PACKAGES),
    f"`{SKIP}` in tests and benchmarks": lambda t: t.skips("tests", "benchmarks"),
    "functions": lambda t: len(list(t.functions)),
    f"functions over {LONG} lines": lambda t: sum(_length(f) > LONG for f in t.functions),
    "functions that take the whole `RunConfig`": lambda t: sum(
        map(takes_whole_configuration, t.functions)
    ),
    "lines of code in the packages": lambda t: sum(
        len(path.read_text("utf-8").splitlines())
        for package in PACKAGES
        for path in (t.root / package).rglob("*.py")
    ),
    "words of README": lambda t: _words(t.root / "README.md"),
    "pages in `docs/`": lambda t: len(list((t.root / "docs").rglob("*.md"))),
    "longest page in `docs/`, lines": lambda t: max(
        len(path.read_text("utf-8").splitlines()) for path in (t.root / "docs").rglob("*.md")
    ),
    "words in `docs/`": lambda t: _words(*(t.root / "docs").rglob("*.md")),
    "pictures in README and `docs/`": lambda t: sum(
        path.read_text("utf-8").count("![")
        for path in (t.root / "README.md", *(t.root / "docs").rglob("*.md"))
    ),
}


def table(trees: list[Tree], heads: list[str]) -> str:
    """The counts as a Markdown table, a column per tree."""
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, count in COUNTS.items():
        cells = (count(tree) for tree in trees)
        lines.append(f"| {name} | {' | '.join(_shown(cell) for cell in cells)} |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Prints the table, and the circles of every tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="+", type=Path, help="folders of checkouts, oldest first")
    options = parser.parse_args()
    trees = [Tree(path) for path in options.trees]
    print(table(trees, [path.name for path in options.trees]))
    for path, tree in zip(options.trees, trees, strict=True):
        for kind, arrows in (("modules", tree.imports), ("rooms", tree.room_arrows)):
            for circle in circles(arrows):
                print(f"{path.name}, circle of {kind}: {', '.join(circle)}")


if __name__ == "__main__":
    main()
