"""Runs one command in this process and says whether it ended as promised."""

import contextlib
import functools
import hashlib
import io
import os
import re
import stat
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import main as command_line
from launch.main import main
from launch.parser import build_parser

# A parser is not changed by what it parses: made once, a case takes half the time.
command_line.build_parser = functools.cache(build_parser)  # type: ignore[assignment]

SIGN = re.compile(
    "^llm4msr[^:\n]*: error: ", re.MULTILINE
)  # with the command's name where argparse says it


class Broken(AssertionError):
    """A promise that was not kept, in one line."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code.
        message: What it said on stderr behind the sign of an error; "" without one.
    """

    code: int
    message: str


def run(*words: str) -> Ended:
    """Runs `llm4msr WORDS`.

    Raises:
        Broken: It ended with a traceback, with another code than 0 and 2, or not with one message.
    """
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            code = main([*words])
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else 1
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0]
        raise Broken(
            f"traceback: {type(error).__name__}: {text[:160]} "
            f"({Path(last.filename).name}:{last.lineno} {last.name})"
        ) from error
    text = said.getvalue()
    if code not in (0, 2):
        raise Broken(f"exit code {code}: {text[-200:]}")
    if "Traceback (most recent call last)" in text:
        raise Broken(f"a traceback was printed: {text[-200:]}")
    messages = SIGN.findall(text)
    if len(messages) != (code == 2):
        raise Broken(f"exit code {code} with {len(messages)} messages: {text[-200:]}")
    message = SIGN.split(text)[-1].strip()
    if code == 2 and len(message) < 10:
        raise Broken(f"a message that says nothing: {message!r}")
    return Ended(code, message if code else "")


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """Raises `Broken` if what lies at these paths differs afterwards."""
    before = {path: contents(path) for path in paths}
    yield
    for path, old in before.items():
        new = contents(path)
        if changed := sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
            raise Broken(f"{path.name}/{changed[0]} was changed")


def contents(path: Path) -> dict[str, str]:
    """Every file below a path with a digest of its bytes; links and special files by what they are."""
    found = {}
    for file in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
        try:
            mode = os.lstat(file).st_mode
        except FileNotFoundError:
            continue
        name = str(file.relative_to(path))
        if stat.S_ISREG(mode):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            found[name] = f"-> {os.readlink(file)}"
        else:
            found[name] = f"{stat.S_IFMT(mode):o}"
    return found
