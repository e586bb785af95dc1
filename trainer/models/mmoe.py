"""MMoE (Ma et al., KDD 2018): shared experts, mixed by a gate per scenario and task."""

from torch import Tensor, nn

from trainer.models.layers import Experts, GroupedLinear, Towers, mix

# The paper has eight for its data; four cost what eight of half the width do.
EXPERTS = 4


class MMoE(nn.Module):
    """y_k = h_k(sum_e softmax(W_k x)_e f_e(x)), a "task" k of the paper being a scenario's task here.

    All experts see all samples; gate W_k and tower h_k belong to one scenario and task. Deviation:
    gates have a bias.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of scenarios.
        hidden: Widths of each expert; a tower's hidden layer has half the last one.
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
        self.experts = Experts(EXPERTS, in_features, hidden, dropout)
        self.gate = GroupedLinear(num_scenarios, in_features, num_tasks * EXPERTS)
        self.towers = Towers(num_scenarios, num_tasks, hidden[-1], dropout)

    def gate_scores(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Scores before the softmax, [B, tasks, experts]."""
        return self.gate(x, scenario).unflatten(1, (-1, EXPERTS))

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        return self.towers(mix(self.experts(x), self.gate_scores(x, scenario)), scenario)
