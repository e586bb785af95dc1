"""HiNet (Zhou et al., ICDE 2023): extraction by scenario, then by task, with a look at the others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import SCENARIO, Experts, Towers, block, block_width

SUB_EXPERTS = 2  # in each scenario's expert and in the shared one
TASK_EXPERTS = 2  # of each task, and as many shared ones


class SubExperts(nn.Module):
    """Sub-expert integration: in each of `num` groups SUB_EXPERTS layers, mixed by the group's gate."""

    def __init__(self, num: int, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.experts = Experts(num * SUB_EXPERTS, in_features, [out_features], dropout)
        self.gate = nn.Linear(in_features, num * SUB_EXPERTS)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        """Maps x [B, in] to the groups' outputs, summed by choice [B, m, num]: [B, m, out]."""
        weights = self.gate(x).unflatten(1, (-1, SUB_EXPERTS)).softmax(dim=-1)
        # Both mixtures at once: the groups' outputs, [B, num, out], are never stored.
        return (choice[..., None] * weights[:, None]).flatten(2) @ self.experts(x)


class HiNet(nn.Module):
    """Scenario extraction [shared, own, attention to others], task extraction, a tower each.

    G: the shared expert; S_s: the scenario's own; A_s = sum over other scenarios j of
    softmax(W embedding_s)_j S_j, the scenario-aware attentive network. Then, on [G, S_s, A_s], each
    task's gate mixes its own and the shared task experts. Since A needs the experts of all scenarios
    for every sample, the cost grows with the number of scenarios, and a scenario's expert learns from
    others' samples too, by design.

    Deviations: the sub-experts have one layer; one scenario extraction layer; the embedding that the
    attention reads is the one in the bottom input; task experts are shared by the scenarios, which
    have towers of their own.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Number of scenarios.
        hidden: Width of the scenario experts, then of the task experts (the same, if one is given).
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
        first, widths = hidden[0], hidden[1:] or hidden
        self.scenarios, self.tasks = num_scenarios, num_tasks
        self.shared = SubExperts(1, in_features, first, dropout)
        self.of_scenarios = SubExperts(num_scenarios, in_features, first, dropout)
        self.dim = block_width(in_features)
        self.attention = nn.Linear(self.dim, num_scenarios)
        self.of_tasks = Experts((num_tasks + 1) * TASK_EXPERTS, 3 * first, widths, dropout)
        self.gate = nn.Linear(3 * first, num_tasks * 2 * TASK_EXPERTS)
        self.towers = Towers(num_scenarios, num_tasks, widths[-1], dropout)

    def attend(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Weights [B, scenarios] of the others; 0 for the sample's own, 1 in sum (0 if alone)."""
        own = F.one_hot(scenario, self.scenarios).bool()
        # A finite mask and a second one: with a single scenario there is nothing to attend to.
        scores = self.attention(block(x, SCENARIO, self.dim)).masked_fill(own, -1e9)
        return scores.softmax(dim=1).masked_fill(own, 0.0)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        own, others = F.one_hot(scenario, self.scenarios).to(x.dtype), self.attend(x, scenario)
        extracted = self.of_scenarios(x, torch.stack([own, others], dim=1))
        shared = self.shared(x, torch.ones_like(x[:, :1, None]))
        h = torch.cat([shared, extracted], dim=1).flatten(1)
        groups = self.of_tasks(h).unflatten(1, (self.tasks + 1, TASK_EXPERTS))
        common = groups[:, -1:].expand(-1, self.tasks, -1, -1)
        pool = torch.cat([groups[:, :-1], common], dim=2)
        weights = self.gate(h).unflatten(1, (self.tasks, -1)).softmax(dim=-1)
        return self.towers((weights[:, :, None] @ pool).squeeze(2), scenario)
