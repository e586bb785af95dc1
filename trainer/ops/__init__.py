"""Operators that can be used alone: `from trainer.ops import meta_linear`."""

from trainer.ops.meta_linear import grouped_linear, meta_linear

__all__ = ["grouped_linear", "meta_linear"]
