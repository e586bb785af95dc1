"""DeepFM (Guo et al., IJCAI 2017): a factorisation machine and an MLP on the same embeddings."""

from torch import Tensor, nn

from trainer.models.layers import HISTORY, MLP, block_width


def pairwise_interactions(fields: Tensor) -> Tensor:
    """Sum of inner products of all pairs of fields [B, F, dim]: [B, 1]."""
    square_of_sum, sum_of_squares = fields.sum(1).square(), fields.square().sum(1)
    return 0.5 * (square_of_sum - sum_of_squares).sum(1, keepdim=True)


class DeepFM(nn.Module):
    """Logit = first order + pairwise products of fields + MLP (DeepFM, eq. 1 and 2).

    A reference without any part of its own for a scenario. Fields are user, item, scenario and mean
    history; the products in the bottom input are no fields. The first-order term reads embeddings
    (the paper has one weight per id, which would be tables of their own). With several tasks the pair
    term, which has no weights, is common to all.

    Args:
        in_features: Width of the bottom input, six equal blocks.
        num_scenarios: Not used.
        hidden: Widths of the MLP.
        dropout: After each hidden layer of the MLP.
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
        self.dim = block_width(in_features)
        self.first_order = nn.Linear(in_features, num_tasks)
        self.deep = MLP(in_features, hidden, dropout)
        self.out = nn.Linear(hidden[-1], num_tasks, bias=False)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        fields = x[:, : (HISTORY + 1) * self.dim].unflatten(1, (HISTORY + 1, -1))
        return self.first_order(x) + pairwise_interactions(fields) + self.out(self.deep(x))
