"""HAMUR (Li et al., CIKM 2023): adapter cells whose weights a hyper-network makes for each instance."""

import itertools
import math

import torch
from torch import Tensor, nn

from trainer.models.layers import MLP, Dropout, GroupedLinear, ScenarioAffine

RANK = 8  # of the generated matrix, which has RANK * RANK numbers per sample
HYPER_WIDTH = 64  # of the hyper-network's hidden layer
CELLS = 2  # after the last layers, as in the paper's experiments


class LowRankLinear(nn.Module):
    """h U I V + b with I [B, k, k] made for each sample: a weight matrix that is never stored."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(in_features, RANK) / math.sqrt(in_features))
        self.v = nn.Parameter(torch.randn(RANK, out_features) / math.sqrt(RANK))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, h: Tensor, instance: Tensor) -> Tensor:
        """Maps h [B, in] to [B, out] by the samples' matrices [B, k, k]."""
        return ((h @ self.u)[:, None] @ instance).squeeze(1) @ self.v + self.bias


class AdapterCell(nn.Module):
    """h + norm_s(up(sigmoid(down(h)))), down and up being generated, half as wide in between."""

    def __init__(self, num_scenarios: int, features: int) -> None:
        super().__init__()
        width = max(features // 2, 1)
        self.down = LowRankLinear(features, width)
        self.up = LowRankLinear(width, features)
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.affine = ScenarioAffine(num_scenarios, features)

    def forward(self, h: Tensor, instance: Tensor, scenario: Tensor) -> Tensor:
        """Maps h [B, n] to [B, n] by the samples' matrices [B, k, k] and their scenarios [B]."""
        y = self.up(self.down(h, instance).sigmoid(), instance)
        return h + self.affine(self.norm(y), scenario)


class HAMUR(nn.Module):
    """An MLP of its own for each scenario, with adapter cells from one hyper-network for all.

    Scenarios share what they know through the hyper-network alone: I = MLP(x) as [B, k, k], and each
    generated weight is U I V with U and V shared, as in the authors' code.

    Deviation: domain normalisation has the scenario's scale and shift, but on a layer norm instead of
    batch statistics; the MLPs and the hyper-network have no batch norm.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of MLPs.
        hidden: Widths of the MLPs; the last two layers carry a cell each (the only one, if it is one).
        dropout: After each hidden layer.
        num_tasks: Logits per sample.
    """

    def __init__(
        self,
        in_features: int,
        num_scenarios: int,
        hidden: list[int],
        dropout: float,
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.hyper = nn.Sequential(
            MLP(in_features, [HYPER_WIDTH], dropout), nn.Linear(HYPER_WIDTH, RANK * RANK)
        )
        self.layers = nn.ModuleList(
            GroupedLinear(num_scenarios, i, o)
            for i, o in itertools.pairwise([in_features, *hidden])
        )
        self.cells = nn.ModuleList(AdapterCell(num_scenarios, width) for width in hidden[-CELLS:])
        self.dropout = Dropout(dropout)
        self.out = GroupedLinear(num_scenarios, hidden[-1], num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        instance = self.hyper(x).view(-1, RANK, RANK)
        without, h = len(self.layers) - len(self.cells), x
        for number, layer in enumerate(self.layers):
            h = self.dropout(layer(h, scenario).relu())
            if number >= without:
                h = self.cells[number - without](h, instance, scenario)
        return self.out(h, scenario)
