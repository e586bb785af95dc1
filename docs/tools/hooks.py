"""What mkdocs does besides rendering: API pages, and links to files that the site does not hold."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "trainer", "embeddings", "llm_knowledge")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds one page per package, whose docstrings mkdocstrings fills in."""
    for package in PACKAGES:
        page = File.generated(config, f"reference/api/{package}.md", content=api_page(package))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ (source files, records of benchmarks) keep their words only."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def shorten(link: re.Match[str]) -> str:
        target = link[2].split("#")[0]
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        inside = (folder / target).resolve().is_relative_to(ROOT / "docs")
        return link[0] if inside else link[1]

    return LINK.sub(shorten, markdown)


def api_page(package: str) -> str:
    """One page of a package: its modules in the order of their paths."""
    lines = [f"# `{package}`", "", "From the docstrings of its modules.", ""]
    for path in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem not in ("__main__", "__init__"):
            lines += [f"## `{module}`", "", f"::: {module}", ""]
    return "\n".join(lines)
