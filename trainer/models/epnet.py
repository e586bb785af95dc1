"""EPNet (the embedding half of PEPNet, Chang et al., KDD 2023): the scenario weighs the input."""

import torch
from torch import Tensor, nn

from trainer.models.layers import MLP, SCENARIO, GateUnit, block, block_width


class EmbeddingGate(nn.Module):
    """E * 2 sigmoid(...[E_scenario, stop_gradient(E)]), E being the whole bottom input."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.dim = block_width(in_features)
        self.gate = GateUnit(self.dim + in_features, in_features)

    def factors(self, x: Tensor) -> Tensor:
        """Factors [B, in]; of x only the scenario's block gets a gradient through them."""
        return self.gate(torch.cat([block(x, SCENARIO, self.dim), x.detach()], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Weighs each number of the bottom input [B, in]."""
        return x * self.factors(x)


class EPNet(nn.Module):
    """The gate on the embeddings, then an MLP that all scenarios share.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used: the input carries the scenario's embedding.
        hidden: Widths of the MLP.
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
        self.layers = MLP(in_features, hidden, dropout)
        self.out = nn.Linear(hidden[-1], num_tasks)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        return self.out(self.layers(self.embedding_gate(x)))
