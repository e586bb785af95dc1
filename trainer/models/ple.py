"""PLE (Tang et al., RecSys 2020): shared and own experts, separated level by level."""

import itertools

import torch
from torch import Tensor, nn

from trainer.models.layers import Experts, GroupedLinear, OwnExperts, Towers, mix, own_groups

# Own experts multiply with scenarios and tasks, shared ones do not.
SHARED_EXPERTS = 2
OWN_EXPERTS = 1


class ExtractionLevel(nn.Module):
    """One level: own experts read their task's state, shared ones the shared state; gates mix them.

    Args:
        num_scenarios: Number of scenarios.
        num_tasks: Tasks per scenario.
        in_features: Width of the states that come in.
        out_features: Width of the experts.
        dropout: On the experts' output.
        is_last: Whether no further level will read a shared state.
    """

    def __init__(
        self,
        num_scenarios: int,
        num_tasks: int,
        in_features: int,
        out_features: int,
        dropout: float,
        is_last: bool,
    ) -> None:
        super().__init__()
        own = num_tasks * OWN_EXPERTS
        self.own = OwnExperts(num_scenarios, own, in_features, [out_features], dropout)
        self.shared = Experts(SHARED_EXPERTS, in_features, [out_features], dropout)
        self.gate = OwnGates(num_scenarios, num_tasks, in_features)
        self.shared_gate = None if is_last else nn.Linear(in_features, own + SHARED_EXPERTS)

    def forward(
        self, states: Tensor, shared: Tensor, scenario: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Maps states [B, tasks, in] and shared [B, in] to the next ones (shared: None if last)."""
        tasks = states.shape[1]
        own = self.own(states.repeat_interleave(OWN_EXPERTS, dim=1), scenario)
        common = self.shared(shared)
        per_task = own.unflatten(1, (tasks, OWN_EXPERTS))
        pool = torch.cat([per_task, common[:, None].expand(-1, tasks, -1, -1)], dim=2)
        weights = self.gate(states, scenario).softmax(dim=-1)
        states = (weights[:, :, None] @ pool).squeeze(2)
        if self.shared_gate is None:
            return states, None
        everyone = torch.cat([own, common], dim=1)
        return states, mix(everyone, self.shared_gate(shared)[:, None]).squeeze(1)


class OwnGates(nn.Module):
    """A gate per scenario and task over its own and the shared experts."""

    def __init__(self, num_scenarios: int, num_tasks: int, in_features: int) -> None:
        super().__init__()
        self.tasks = num_tasks
        self.linear = GroupedLinear(
            num_scenarios * num_tasks, in_features, OWN_EXPERTS + SHARED_EXPERTS
        )

    def forward(self, states: Tensor, scenario: Tensor) -> Tensor:
        """Maps states [B, tasks, in] to scores [B, tasks, experts]."""
        group = own_groups(scenario, self.tasks)
        return self.linear(states.flatten(0, 1), group).unflatten(0, (-1, self.tasks))


class PLE(nn.Module):
    """Progressive layered extraction, a level per width of `hidden`, then a tower per scenario and task.

    State of task k: sum of softmax(W_k state_k) over its own and the shared experts. Shared state: the
    same over all experts, with a gate of its own, up to the last level but one.

    Deviations: where the paper's tasks all read one input, here they are the tasks of the scenarios,
    and a sample meets its own scenario's experts only. So the shared state mixes the shared experts
    with those of the sample's scenario rather than of all scenarios: the cost does not grow with the
    number of scenarios, and no scenario's experts learn from another's samples. Gates have a bias.
    An expert has one layer per level.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of scenarios.
        hidden: Width of the experts at each level; a tower's hidden layer has half the last one.
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
        widths = list(itertools.pairwise([in_features, *hidden]))
        self.tasks = num_tasks
        self.levels = nn.ModuleList(
            ExtractionLevel(num_scenarios, num_tasks, i, o, dropout, level == len(hidden) - 1)
            for level, (i, o) in enumerate(widths)
        )
        self.towers = Towers(num_scenarios, num_tasks, hidden[-1], dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        states, shared = x[:, None].expand(-1, self.tasks, -1), x
        for level in self.levels:
            states, shared = level(states, shared, scenario)
        return self.towers(states, scenario)
