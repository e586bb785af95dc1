"""PEPNet (Chang et al., KDD 2023): EPNet's gate on the input, PPNet's gates on the layers."""

from torch import Tensor, nn

from trainer.models.epnet import EmbeddingGate
from trainer.models.layers import block_width
from trainer.models.ppnet import GatedTowers, personal_prior


class PEPNet(nn.Module):
    """The scenario weighs the embeddings; user and item weigh each task's hidden units.

    O = E * EPNet gate; towers read O; their gates read [user, item, stop_gradient(O)]. All of it is
    shared by the scenarios, as in the paper, where the scenario speaks through the first gate. That the
    general embeddings are not moved through a gate is the paper's stop-gradient.

    Deviation: the paper's prior also has the item's author; here it is user and item.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used: the input carries the scenario's embedding.
        hidden: Widths of the towers.
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
        self.embedding_gate = EmbeddingGate(in_features)
        self.dim = block_width(in_features)
        self.towers = GatedTowers(2 * self.dim, in_features, hidden, dropout, num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        return self.towers(personal_prior(x, self.dim), self.embedding_gate(x))
