"""STAR (Sheng et al., CIKM 2021): each scenario's weights are the product of shared and own ones."""

import itertools

import torch
from torch import Tensor, nn

from trainer.models.layers import MLP, Dropout
from trainer.ops import Groups, grouped_linear, sort_groups, take_rows


class StarLinear(nn.Module):
    """A linear layer with weight W_shared * W_own[s] and bias b_shared + b_own[s] (STAR, eq. 5)."""

    def __init__(self, num_scenarios: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shared = nn.Linear(in_features, out_features)
        # Own weights begin at one and own biases at zero: all scenarios start as the shared layer.
        self.own_weight = nn.Parameter(torch.ones(num_scenarios, out_features, in_features))
        self.own_bias = nn.Parameter(torch.zeros(num_scenarios, out_features))

    def forward(self, x: Tensor, scenario: Tensor | Groups) -> Tensor:
        """Maps [B, in] to [B, out], each sample by its scenario's weights."""
        weight = self.shared.weight * self.own_weight
        return grouped_linear(x, weight, self.shared.bias + self.own_bias, scenario)


class Star(nn.Module):
    """The star topology with its auxiliary network.

    The paper normalises with batch statistics kept per scenario; here the scenario's scale and shift
    act on a layer norm, so that no sample's score depends on which others share its batch.

    Args:
        in_features: Width of the bottom input, which carries the scenario's embedding.
        num_scenarios: Number of scenarios.
        hidden: Widths of the star layers.
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
        self.norm = nn.LayerNorm(in_features)
        self.scale = nn.Parameter(torch.ones(num_scenarios, in_features))
        self.shift = nn.Parameter(torch.zeros(num_scenarios, in_features))
        self.layers = nn.ModuleList(
            StarLinear(num_scenarios, i, o) for i, o in itertools.pairwise([in_features, *hidden])
        )
        self.dropout = Dropout(dropout)
        self.out = StarLinear(num_scenarios, hidden[-1], num_tasks)
        self.auxiliary = nn.Sequential(
            MLP(in_features, [hidden[-1]], dropout), nn.Linear(hidden[-1], num_tasks)
        )

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        scale, shift = take_rows(self.scale, scenario), take_rows(self.shift, scenario)
        h = self.norm(x) * scale + shift
        groups = sort_groups(scenario, len(self.scale))  # once for all layers
        for layer in self.layers:
            h = self.dropout(layer(h, groups).relu())
        return self.out(h, groups) + self.auxiliary(x)
