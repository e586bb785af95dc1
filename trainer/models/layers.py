"""Layers that several backbones share. Plain integers and tensors, no configuration."""

import itertools
import math

import torch
from torch import Tensor, nn

from trainer.ops import grouped_linear


class MLP(nn.Sequential):
    """Linear, ReLU, dropout per width: [B, in] to [B, widths[-1]]."""

    def __init__(self, in_features: int, widths: list[int], dropout: float) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise([in_features, *widths]):
            layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers)


class GroupedLinear(nn.Module):
    """One linear layer per scenario: [B, in] and the scenario of each sample [B] to [B, out]."""

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(
            torch.empty(num_groups, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(num_groups, out_features))

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Applies to each sample the layer of its group."""
        return grouped_linear(x, self.weight, self.bias, group)
