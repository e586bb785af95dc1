"""Operators that can be used alone: `from trainer.ops import meta_linear`. See docs/results/meta-layer.md."""

from trainer.ops.cheap import meta_core, meta_gate
from trainer.ops.grouped import Groups, group_by_key, grouped_linear, sort_groups, take_rows
from trainer.ops.meta_linear import choose_strategy, explain_strategy, meta_linear

__all__ = [
    "Groups",
    "choose_strategy",
    "explain_strategy",
    "group_by_key",
    "grouped_linear",
    "meta_core",
    "meta_gate",
    "meta_linear",
    "sort_groups",
    "take_rows",
]
