"""Backbones and the LLM4MSR wrapper around any of them."""

from importlib import import_module

from torch import nn

from trainer.config.backbones import BACKBONE_CLASSES


def _class_of(path: str) -> type[nn.Module]:
    module, name = path.split(".")
    backbone: type[nn.Module] = getattr(import_module(f"{__name__}.{module}"), name)
    return backbone


# Name in configurations to class. All are made as (in_features, num_scenarios, hidden, dropout,
# num_tasks) and map the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks].
BACKBONES = {name: _class_of(path) for name, path in BACKBONE_CLASSES.items()}
