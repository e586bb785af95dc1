"""AdaSparse (Yang et al., CIKM 2022): each scenario prunes the neurons that it does not need."""

import itertools

import torch
from torch import Tensor, nn

from trainer.models.layers import SCENARIO, Dropout, block, block_width

# The paper's values for the fused form: factors in {0} or (0.25, 2), 1 where the pruner says nothing.
THRESHOLD = 0.25
SCALE = 2.0


class Pruner(nn.Module):
    """Factors of a layer's neurons from the scenario and the layer's own output (the fused form).

    f = SCALE sigmoid(W [scenario, h]); f where f > THRESHOLD, else 0.
    """

    def __init__(self, scenario_features: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(scenario_features + features, features, bias=False)

    def forward(self, scenario: Tensor, h: Tensor) -> Tensor:
        """Maps the scenario's embedding [B, dim] and h [B, n] to factors [B, n]."""
        factors = SCALE * self.linear(torch.cat([scenario, h], dim=1)).sigmoid()
        return factors * (factors > THRESHOLD)


class AdaSparse(nn.Module):
    """A shared MLP whose input and hidden layers are multiplied by the pruner's factors.

    Deviations: the sigmoid's slope is not raised in the course of training, and the regulariser that
    steers the share of pruned neurons, a term of the loss, is left out: how sparse it gets is learned.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used: the input carries the scenario's embedding.
        hidden: Widths of the layers.
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
        self.dim, widths = block_width(in_features), [in_features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.pruners = nn.ModuleList(Pruner(self.dim, width) for width in widths)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(hidden[-1], num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        embedding = block(x, SCENARIO, self.dim)
        h = x * self.pruners[0](embedding, x)
        for layer, pruner in zip(self.layers, self.pruners[1:], strict=True):
            h = layer(h).relu()
            h = self.dropout(h * pruner(embedding, h))
        return self.out(h)
