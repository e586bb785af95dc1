"""PPNet (the parameter half of PEPNet, Chang et al., KDD 2023): user and item weigh hidden units."""

import itertools

import torch
from torch import Tensor, nn

from trainer.models.layers import ITEM, USER, Dropout, GateUnit, ParallelLinear, block, block_width


class GatedTowers(nn.Module):
    """A DNN per task, each hidden layer's output multiplied by factors from the prior.

    H_l = delta_l * act(W_l H_{l-1} + b_l), delta_l = 2 sigmoid(...[prior, stop_gradient(x)]), one gate
    per layer for all tasks together.

    Args:
        prior_features: Width of the prior.
        in_features: Width of x.
        hidden: Widths of the layers.
        dropout: After each hidden layer.
        num_tasks: Number of towers.
    """

    def __init__(
        self,
        prior_features: int,
        in_features: int,
        hidden: list[int],
        dropout: float,
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ParallelLinear(num_tasks, i, o) for i, o in itertools.pairwise([in_features, *hidden])
        )
        self.gates = nn.ModuleList(
            GateUnit(prior_features + in_features, num_tasks * width) for width in hidden
        )
        self.dropout = Dropout(dropout)
        self.out = ParallelLinear(num_tasks, hidden[-1], 1)

    def forward(self, prior: Tensor, x: Tensor) -> Tensor:
        """Maps the prior [B, prior] and x [B, in] to logits [B, tasks]."""
        told, h = torch.cat([prior, x.detach()], dim=1), x
        for layer, gate in zip(self.layers, self.gates, strict=True):
            h = layer(h).relu()
            h = self.dropout(h * gate(told).view(h.shape))
        return self.out(h).squeeze(-1)


def personal_prior(x: Tensor, dim: int) -> Tensor:
    """What tells users and items apart: their embeddings [B, 2 * dim] in the bottom input [B, in]."""
    return torch.cat([block(x, USER, dim), block(x, ITEM, dim)], dim=1)


class PPNet(nn.Module):
    """A tower per task whose hidden units user and item weigh; shared by all scenarios.

    Deviation: the paper's prior also has the item's author; here it is user and item.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used: the input carries the scenario's embedding.
        hidden: Widths of the towers.
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
        self.dim = block_width(in_features)
        self.towers = GatedTowers(2 * self.dim, in_features, hidden, dropout, num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        return self.towers(personal_prior(x, self.dim), x)
