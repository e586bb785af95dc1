"""M2M (Zhang et al., WSDM 2022): the scenario generates attention over experts, and the tower."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import (
    MLP,
    SCENARIO,
    Experts,
    ParallelLinear,
    block,
    block_width,
)
from trainer.ops import meta_linear

EXPERTS = 4
# Width of the scenario's representation: each of its numbers costs one more matrix per meta unit.
SCENARIO_WIDTH = 8


class MetaUnit(nn.Module):
    """A layer whose weights the scenario generates: W = reshape(V s + v), b = U s + u, y = W h + b."""

    def __init__(self, features: int) -> None:
        super().__init__()
        weight = torch.empty(SCENARIO_WIDTH + 1, features, features)
        bound = 1 / math.sqrt(features)
        weight[-1].uniform_(-bound, bound)
        weight[:-1].normal_(std=bound / math.sqrt(SCENARIO_WIDTH))
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(SCENARIO_WIDTH + 1, features))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """Maps rows h [B * n, features] by the scenario of their sample, s [B, SCENARIO_WIDTH]."""
        # Not one group per sample: grouped would store a matrix for each.
        per_row = s[:, None].expand(-1, len(h) // max(len(s), 1), -1).flatten(0, 1)
        return meta_linear(h, per_row, self.weight, self.bias)


class M2M(nn.Module):
    """Experts E_e, a vector T_t per task, meta attention and meta tower, both generated from s.

    s = MLP(scenario embedding); a_te = v . act(Meta([E_e, T_t])); R_t = sum_e softmax(a_t)_e E_e;
    output = act(Meta'(R_t) + R_t), then a linear layer per task. act is a leaky ReLU.

    Deviations: the transformer over the advertiser's sequences is left out, since a backbone is given
    the pooled history; T_t is a free vector (an MLP of a task's id can be no more); s reads the
    scenario alone, without the profile; the loss is the trainer's, not Poisson regression.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used: the input carries the scenario's embedding, so a new scenario needs
            no new parameters.
        hidden: Widths of each expert.
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
        width = hidden[-1]
        self.experts = Experts(EXPERTS, in_features, hidden, dropout)
        self.tasks = nn.Parameter(torch.randn(num_tasks, width))
        self.dim = block_width(in_features)
        self.scenario = MLP(self.dim, [SCENARIO_WIDTH], dropout=0.0)
        self.attention = MetaUnit(2 * width)
        self.score = nn.Linear(2 * width, 1, bias=False)
        self.tower = MetaUnit(width)
        self.out = ParallelLinear(num_tasks, width, 1)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        s, experts = self.scenario(block(x, SCENARIO, self.dim)), self.experts(x)
        rows, tasks = len(x), len(self.tasks)
        shape = (rows, tasks, EXPERTS, -1)
        pairs = torch.cat(
            [experts[:, None].expand(shape), self.tasks[None, :, None].expand(shape)], dim=-1
        )
        met = F.leaky_relu(self.attention(pairs.flatten(0, 2), s))
        weights = self.score(met).view(rows, tasks, EXPERTS).softmax(dim=-1)
        mixed = (weights @ experts).flatten(0, 1)
        h = F.leaky_relu(self.tower(mixed, s) + mixed)
        return self.out(h.unflatten(0, (rows, tasks))).squeeze(-1)
