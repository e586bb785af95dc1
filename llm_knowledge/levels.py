"""The levels of knowledge: whose vector a row of a store is."""

from typing import Literal, get_args

Level = Literal["user", "scenario", "item"]
LEVELS: tuple[str, ...] = get_args(Level)
