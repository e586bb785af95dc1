"""Levels of a sample, each with the names that it goes by: in columns, in tables, in encoded rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LevelNames:
    """Names of a level.

    Attributes:
        name: In configurations, stores and batches; of its id table, too, if it has one.
    """

    name: str

    @property
    def id_column(self) -> str:
        """Column of its ids in a dataset."""
        return f"{self.name}_id"

    @property
    def knowledge(self) -> str:
        """Table of its knowledge vectors; the rows of such a table that samples read."""
        return f"{self.name}_knowledge"


USER, SCENARIO, ITEM = (LevelNames(name) for name in ("user", "scenario", "item"))
LEVELS = (USER, SCENARIO, ITEM)
# Whose ids and vectors lie in sharded tables. Scenarios are few: every rank keeps all of them.
TABLE_LEVELS = (USER, ITEM)
KNOWLEDGE_TABLES = {level.knowledge: level for level in TABLE_LEVELS}
