"""SharedBottom (Caruana, 1997): one bottom for all scenarios, a tower for each."""

from torch import Tensor, nn

from trainer.models.layers import MLP, Dropout, GroupedLinear


class SharedBottom(nn.Module):
    """A shared MLP of `hidden` widths, then per scenario a tower of one hidden layer.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Number of towers.
        hidden: Widths of the shared layers; the tower's hidden layer has half the last one.
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
        width = max(hidden[-1] // 2, 1)
        self.bottom = MLP(in_features, hidden, dropout)
        self.tower_in = GroupedLinear(num_scenarios, hidden[-1], width)
        self.tower_out = GroupedLinear(num_scenarios, width, num_tasks)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks]."""
        h = self.dropout(self.tower_in(self.bottom(x), scenario).relu())
        return self.tower_out(h, scenario)
