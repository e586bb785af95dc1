"""AITM (Xi et al., KDD 2021): what one task learned is transferred to the next task in line."""

import math

import torch
from torch import Tensor, nn

from trainer.models.layers import Experts, Towers


class Transfer(nn.Module):
    """Adaptive information transfer: attention over the earlier task's message and the task's own state.

    z = sum_u w_u h_1(u) over u in {message, own}, w = softmax(<h_2(u), h_3(u)> / sqrt(k)).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.value = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)

    def forward(self, earlier: Tensor, own: Tensor) -> Tensor:
        """Maps the earlier task's state and the task's own one, both [B, k], to its new state [B, k]."""
        u = torch.stack([self.message(earlier), own], dim=1)
        scores = (self.key(u) * self.query(u)).sum(-1) / math.sqrt(u.shape[-1])
        return (scores.softmax(dim=1)[:, None] @ self.value(u)).squeeze(1)


class AITM(nn.Module):
    """A bottom per task, transfer along the tasks in their order, a tower per scenario and task.

    The order is that of the labels (click, then purchase). **With one task there is nothing to
    transfer and this is SharedBottom.** Scenarios have no order, so no transfer between them is made
    up; they differ by their towers, and bottoms and transfers are shared by all.

    Deviation: the paper's calibrator, a penalty where a later task is predicted likelier than an
    earlier one, is a term of the loss and left out.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of scenarios.
        hidden: Widths of each task's bottom; a tower's hidden layer has half the last one.
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
        self.bottoms = Experts(num_tasks, in_features, hidden, dropout)
        self.transfers = nn.ModuleList(Transfer(hidden[-1]) for _ in range(num_tasks - 1))
        self.towers = Towers(num_scenarios, num_tasks, hidden[-1], dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        first, *others = self.bottoms(x).unbind(1)
        states = [first]
        for transfer, own in zip(self.transfers, others, strict=True):
            states.append(transfer(states[-1], own))
        return self.towers(torch.stack(states, dim=1), scenario)
