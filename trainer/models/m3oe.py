"""M3oE (Zhang et al., SIGIR 2024): shared, scenario and task experts, fused on two levels."""

import torch
from torch import Tensor, nn

from trainer.models.layers import Experts, GroupedLinear, Towers, mix
from trainer.models.star import StarLinear

SHARED_EXPERTS = 4


class Balance(nn.Module):
    """First fusion: b * own expert + (1 - b) * mean of the others, b = sigmoid of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, experts: Tensor, own: Tensor) -> Tensor:
        """Balances each of `own` [B, m, o], which are among experts [B, n, o], with the others."""
        share = self.logit.sigmoid()
        others = experts.sum(1, keepdim=True) - own
        return share * own + (1 - share) / max(experts.shape[1] - 1, 1) * others


class M3oE(nn.Module):
    """A star layer with a shortcut, three groups of experts on it, two fusions, a tower each.

    e = act(norm(W star_s(x))) + act(norm(W' x)). Experts read e: SHARED_EXPERTS that are mixed by a
    gate per scenario and task, one per scenario, one per task. First fusion: `Balance`. Second:
    shared + sigmoid(a) * scenario's + sigmoid(b) * task's. Every sample passes all scenarios'
    experts, so the cost grows with their number. Gates read e without sending gradient to it, as in
    the authors' code.

    Deviation: the four fusion weights learn with all others by the same loss, where the paper has a
    bi-level search.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of scenarios.
        hidden: Width of the star layer, then of the experts (the same, if only one is given).
        dropout: After each hidden layer of experts and towers.
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
        self.star = StarLinear(num_scenarios, in_features, first)
        self.after_star = nn.Sequential(nn.Linear(first, first), nn.LayerNorm(first), nn.ReLU())
        self.shortcut = nn.Sequential(nn.Linear(in_features, first), nn.LayerNorm(first), nn.ReLU())
        self.shared = Experts(SHARED_EXPERTS, first, widths, dropout)
        self.of_scenarios = Experts(num_scenarios, first, widths, dropout)
        self.of_tasks = Experts(num_tasks, first, widths, dropout)
        self.gate = GroupedLinear(num_scenarios, first, num_tasks * SHARED_EXPERTS)
        self.scenario_balance, self.task_balance = Balance(), Balance()
        self.fusion = nn.Parameter(torch.zeros(2))
        self.towers = Towers(num_scenarios, num_tasks, widths[-1], dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        e = self.after_star(self.star(x, scenario)) + self.shortcut(x)
        scores = self.gate(e.detach(), scenario).unflatten(1, (-1, SHARED_EXPERTS))
        rows = torch.arange(len(x), device=x.device)
        of_scenarios, of_tasks = self.of_scenarios(e), self.of_tasks(e)
        of_scenario = self.scenario_balance(of_scenarios, of_scenarios[rows, scenario][:, None])
        of_tasks = self.task_balance(of_tasks, of_tasks)
        a, b = self.fusion.sigmoid()
        return self.towers(mix(self.shared(e), scores) + a * of_scenario + b * of_tasks, scenario)
