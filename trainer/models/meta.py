"""Hierarchical meta networks: knowledge vectors in, meta layers out (LLM4MSR).

Every form starts the training where the plain backbone starts it, but for `form="linear"`, which is
the paper's own and replaces the bottom input by a generated layer's output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import MLP
from trainer.ops import meta_linear


def standardise(vectors: Tensor) -> Tensor:
    """Centres vectors [N, dim] and gives them length 1 (0 stays 0).

    Hidden states are badly scaled: some dimensions are a hundred times others', and their length says
    nothing. Length 1 rather than variance 1, because a step of Adam moves every weight by the same
    amount, so what a projection's output moves by grows with the sum of its inputs.
    """
    return F.layer_norm(vectors, vectors.shape[-1:]) / math.sqrt(vectors.shape[-1])


class KnowledgeAdapter(nn.Module):
    """Knowledge vector to the small code z that meta networks read: normalise, disturb, project.

    A vector that is unique to a user is that user's id in disguise, and a generator can memorise it.
    Hence a narrow code, noise, and while training now and then the default in place of the vector.

    Args:
        dim: Width of the knowledge vectors.
        rank: Width of z.
        noise: Length of Gaussian noise on the vector, whose own length is 1 (training only).
        dropout: Share of vectors replaced by the default (training only).
    """

    def __init__(self, dim: int, rank: int, noise: float, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(dim, rank, bias=False)
        nn.init.normal_(self.project.weight)  # of a vector of length 1 it makes z of variance 1
        self.default = nn.Parameter(torch.zeros(rank))
        self.noise, self.dropout = noise, dropout

    def forward(self, vectors: Tensor, known: Tensor) -> Tensor:
        """Maps vectors [N, dim], with `known` bool [N], to z [N, rank]; unknown rows get the default."""
        normal = standardise(vectors)
        if self.training:
            scale = self.noise / math.sqrt(vectors.shape[-1])
            normal = normal + scale * torch.randn_like(normal)
            known = known & (torch.rand(known.shape, device=known.device) >= self.dropout)
        return torch.where(known[:, None], self.project(normal), self.default)


class MetaLayer(nn.Module):
    """One generated layer W(z) = W_0 + sum_j z_j A_j, b(z) = c_0 + sum_j z_j c_j.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Width of z.
        zero_generator: Begin with A = 0 and c = 0, so that knowledge has no say until it is learned.
        zero_shared: Begin with W_0 = 0 and c_0 = 0 as well.
        strategy: Of the op, see `trainer.ops.meta_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        zero_generator: bool,
        zero_shared: bool,
        strategy: str,
    ) -> None:
        super().__init__()
        weight = torch.zeros(rank + 1, out_features, in_features)
        if not zero_generator:
            weight[:-1].normal_(std=1 / math.sqrt(in_features * rank))
        if not zero_shared:
            weight[-1].uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(rank + 1, out_features))
        self.strategy = strategy

    def forward(self, h: Tensor, z: Tensor, group: Tensor | None = None) -> Tensor:
        """Maps h [B, in] to [B, out] by the layer that z [B, rank] (or z[group]) generates."""
        if group is None:
            # "grouped" speaks of shared vectors; without a group every sample has its own.
            strategy = "auto" if self.strategy == "grouped" else self.strategy
            return meta_linear(h, z, self.weight, self.bias, strategy=strategy)
        return meta_linear(h, z, self.weight, self.bias, group=group, strategy=self.strategy)


class UserMetaLayers(nn.Module):
    """User-level meta layers at the bottom: [B, width] to [B, width], by each sample's z_u."""

    def __init__(self, width: int, layers: int, rank: int, form: str, strategy: str) -> None:
        super().__init__()
        self.residual = form == "residual"
        self.layers = nn.ModuleList(
            MetaLayer(
                width,
                width,
                rank,
                zero_generator=self.residual,
                zero_shared=self.residual,
                strategy=strategy,
            )
            for _ in range(layers)
        )

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Applies h + W(z)h + b(z) (residual) or leaky_relu(W(z)h + b(z)) (linear), layer by layer."""
        for layer in self.layers:
            y = layer(h, z)
            h = h + y if self.residual else F.leaky_relu(y)
        return h


class ScenarioMetaLayers(nn.Module):
    """Scenario-level meta layers in parallel to the backbone: a generated stack with its own logits."""

    def __init__(
        self,
        in_features: int,
        width: int,
        layers: int,
        rank: int,
        form: str,
        num_tasks: int,
        strategy: str,
    ) -> None:
        super().__init__()
        residual = form == "residual"
        widths = [in_features] + [width] * layers
        self.layers = nn.ModuleList(
            MetaLayer(
                widths[i],
                widths[i + 1],
                rank,
                zero_generator=residual,
                zero_shared=False,
                strategy=strategy,
            )
            for i in range(layers)
        )
        self.out = nn.Linear(width, num_tasks)
        if residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor, z: Tensor, group: Tensor) -> Tensor:
        """Maps the bottom input [B, in] to logits [B, tasks] by z[group], z being [S + 1, rank]."""
        for layer in self.layers:
            h = F.leaky_relu(layer(h, z, group))
        return self.out(h)


class KnowledgeMatch(nn.Module):
    """How well a user's knowledge meets an item's: elementwise product of projections, and cosine.

    Args:
        user_dim: Width of user vectors.
        item_dim: Width of item vectors; the cosine is left out if it differs.
        width: Width of the projections.
        num_tasks: Logits per sample.
    """

    def __init__(self, user_dim: int, item_dim: int, width: int, num_tasks: int) -> None:
        super().__init__()
        self.user = nn.Linear(user_dim, width, bias=False)
        self.item = nn.Linear(item_dim, width, bias=False)
        nn.init.normal_(self.user.weight)
        nn.init.normal_(self.item.weight)
        self.has_cosine = user_dim == item_dim
        self.hidden = MLP(width + int(self.has_cosine), [16], dropout=0.0)
        self.out = nn.Linear(16, num_tasks, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, users: Tensor, items: Tensor, known: Tensor) -> Tensor:
        """Maps vectors [B, user_dim], [B, item_dim] to logits [B, tasks]; 0 where `known` is false."""
        features = [self.user(standardise(users)) * self.item(standardise(items))]
        if self.has_cosine:
            # Cosines of one encoder's texts lie in a narrow band; widened to the scale of the others.
            features.append(5 * F.cosine_similarity(users, items, dim=-1)[:, None])
        return self.out(self.hidden(torch.cat(features, dim=1))) * known[:, None]
