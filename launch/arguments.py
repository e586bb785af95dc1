"""A parser of command lines that loses nothing of what was typed."""

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` in which an option that is given again does not replace the first.

    Options that take several values take all of them, in order: `--cutoffs 5 --cutoffs 7` is
    `--cutoffs 5 7`. Of options that take one value, a second value is refused. Examples stand in the
    help as they are typed, on one line.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **settings)
        self.register("action", None, _Keep)
        self.register("action", "store", _Keep)


class _Keep(argparse.Action):
    """Stores the values of an option; the first occurrence replaces the default, others add to it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        earlier: set[str] = namespace.__dict__.setdefault("given_options", set())
        if option_string is not None and self.dest in earlier:
            stored = getattr(namespace, self.dest)
            if isinstance(self.nargs, str) and self.nargs in "+*" and isinstance(values, list):
                values = [*stored, *values]
            elif stored != values:
                raise argparse.ArgumentError(
                    self, f"given twice, as {stored} and as {values}; give it once"
                )
        earlier.add(self.dest)
        setattr(namespace, self.dest, values)
