"""DNN: one MLP for everything, the reference that has no part of its own for any scenario."""

from torch import Tensor, nn

from trainer.models.layers import MLP


class DNN(nn.Module):
    """An MLP of `hidden` widths and a linear output.

    A model made for a single scenario, trained on all of them. What it can know of scenarios is the
    embedding that the bottom input carries.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Not used.
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
        self.layers = MLP(in_features, hidden, dropout)
        self.out = nn.Linear(hidden[-1], num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        return self.out(self.layers(x))
