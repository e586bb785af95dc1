"""SAR-Net (Shen et al., CIKM 2021): a scenario's own view of the input, shared and own experts."""

import torch
from torch import Tensor, nn

from trainer.models.layers import Experts, OwnExperts, ScenarioAffine, Towers, mix

# Own experts multiply with the scenarios (the paper has hundreds), shared ones do not.
SHARED_EXPERTS = 4
OWN_EXPERTS = 1


class SARNet(nn.Module):
    """Scenario-specific linear transformation, expert networks, multi-scenario gate.

    x_s = x * scale_s + shift_s; the gate softmax(W x_s) mixes the shared experts and those of the
    sample's scenario; the output layers are shared by all scenarios. One gate per task.

    Deviations: the paper's two attentions over behaviours from all scenarios are left out, since a
    backbone is given the pooled history; so is the fairness coefficient, which needs to know of manual
    intervention in the logs. The batch norm at the head of each expert is one layer norm for all.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of scenarios.
        hidden: Widths of each expert; the output's hidden layer has half the last one.
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
        self.transform = ScenarioAffine(num_scenarios, in_features)
        self.norm = nn.LayerNorm(in_features)
        self.shared = Experts(SHARED_EXPERTS, in_features, hidden, dropout)
        self.own = OwnExperts(num_scenarios, OWN_EXPERTS, in_features, hidden, dropout)
        self.gate = nn.Linear(in_features, num_tasks * (SHARED_EXPERTS + OWN_EXPERTS))
        self.towers = Towers(1, num_tasks, hidden[-1], dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        h = self.norm(self.transform(x, scenario))
        experts = torch.cat([self.shared(h), self.own(h, scenario)], dim=1)
        scores = self.gate(h).unflatten(1, (-1, SHARED_EXPERTS + OWN_EXPERTS))
        return self.towers(mix(experts, scores), torch.zeros_like(scenario))
