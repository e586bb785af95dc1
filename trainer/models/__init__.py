"""Backbones and the LLM4MSR wrapper around any of them."""
