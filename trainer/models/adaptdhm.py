"""AdaptDHM (Li et al., 2022): samples are routed to clusters, which need not be the scenarios."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import Dropout
from trainer.models.star import StarLinear

# Few: a cluster is a distribution that several scenarios share.
CLUSTERS = 3
# Of the cosine between sample and centre; with 1 the coefficients of three clusters hardly differ.
TEMPERATURE = 0.2


class AdaptDHM(nn.Module):
    """Each sample goes to the cluster of the nearest centre; layers are shared * cluster's weights.

    r = softmax(<x, c>) over the centres c, the cluster is argmax r, layer l has weight
    W_l * W_l^cluster.

    Deviations: the paper moves the centres to the batch's means before it routes, so a score depends on
    the batch; here centres are parameters, which learn through r (a factor of value 1 and gradient
    that of r on the hidden layer) and thus are the same on all ranks. Sample and centre are
    normalised, embeddings being short at first. Routing reads x without sending gradient to it.

    Args:
        in_features: Width of the bottom input.
        num_scenarios: Not used: the clusters take their place.
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
        self.centres = nn.Parameter(torch.randn(CLUSTERS, in_features))
        self.layers = nn.ModuleList(
            StarLinear(CLUSTERS, i, o) for i, o in itertools.pairwise([in_features, *hidden])
        )
        self.dropout = Dropout(dropout)
        self.out = StarLinear(CLUSTERS, hidden[-1], num_tasks)

    def route(self, x: Tensor) -> Tensor:
        """Coefficients [B, clusters] of the bottom input [B, in]; each row sums to one."""
        cosines = F.normalize(x.detach(), dim=1) @ F.normalize(self.centres, dim=1).t()
        return (cosines / TEMPERATURE).softmax(dim=1)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks]; scenarios int64 [B] are not read."""
        coefficient, cluster = self.route(x).max(dim=1)
        h = x
        for layer in self.layers:
            h = self.dropout(layer(h, cluster).relu())
        straight_through = 1 + coefficient - coefficient.detach()
        return self.out(h * straight_through[:, None], cluster)
