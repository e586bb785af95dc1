"""DCNv2 (Wang et al., WWW 2021): explicit feature crosses beside an MLP."""

import torch
from torch import Tensor, nn

from trainer.models.layers import MLP

# Crosses up to order CROSS_LAYERS + 1 in numbers that may be products already. A third layer made
# training with meta layers in front diverge at large steps, and the paper gains little from it.
CROSS_LAYERS = 2


class CrossLayer(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l with a full matrix W (DCNv2, eq. 1)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Maps the input x0 and the previous layer's output x, both [B, n], to [B, n]."""
        return x0 * self.linear(x) + x


class DCNv2(nn.Module):
    """Cross network and MLP in parallel, their outputs concatenated and projected to the logits.

    A reference without any part of its own for a scenario. Of the paper's forms this is the parallel
    one with full matrices; its low-rank mixture is left out, the input being narrow.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Not used.
        hidden: Widths of the MLP.
        dropout: After each hidden layer of the MLP.
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
        self.cross = nn.ModuleList(CrossLayer(in_features) for _ in range(CROSS_LAYERS))
        self.deep = MLP(in_features, hidden, dropout)
        self.out = nn.Linear(in_features + hidden[-1], num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        crossed = x
        for layer in self.cross:
            crossed = layer(x, crossed)
        return self.out(torch.cat([crossed, self.deep(x)], dim=1))
