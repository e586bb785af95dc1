"""Hierarchical meta networks: knowledge vectors in, meta layers out (LLM4MSR).

Every form starts the training where the plain backbone starts it, but for `form="linear"`, which is
the paper's own and replaces the bottom input by a generated layer's output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import MLP
from trainer.ops import explain_strategy, meta_core, meta_gate, meta_linear


def standardise(vectors: np.ndarray) -> np.ndarray:
    """Centres vectors [N, dim] and gives them length 1, as float32 (0 stays 0).

    Done once, when a table is filled: everything below reads standardised vectors. Hidden states are
    badly scaled: some dimensions are a hundred times others', and their length says nothing. Length 1
    rather than variance 1, because a step of Adam moves every weight by the same amount, so what a
    projection's output moves by grows with the sum of its inputs.
    """
    centred = vectors - vectors.mean(axis=1, dtype=np.float32, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 1e-6, length, np.inf)


def project(vectors: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    """What several linear layers without bias make of the same vectors [N, dim], as one product."""
    weights = [layer.weight for layer in layers]
    made = F.linear(vectors, torch.cat(weights) if len(weights) > 1 else weights[0])
    return list(made.split([len(weight) for weight in weights], dim=1))


class KnowledgeAdapter(nn.Module):
    """Knowledge vector to the small code z that meta networks read: project, disturb.

    A vector that is unique to a user is that user's id in disguise, and a generator can memorise it.
    Hence a narrow code, noise, and while training now and then the default in place of the vector.

    Args:
        dim: Width of the knowledge vectors.
        rank: Width of z.
        noise: Length of Gaussian noise on the vector, whose own length is 1 (training only).
        dropout: Share of vectors replaced by the default (training only).
        hidden: Width of a hidden layer between vector and z; None projects directly.
    """

    def __init__(
        self, dim: int, rank: int, noise: float, dropout: float, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(dim, hidden or rank, bias=False)
        nn.init.normal_(self.first.weight)  # of a vector of length 1 it makes numbers of variance 1
        self.rest = nn.Sequential()
        if hidden is not None:
            self.rest = nn.Sequential(nn.GELU(), nn.Linear(hidden, rank))
        self.default = nn.Parameter(torch.zeros(rank))
        self.noise, self.dropout = noise, dropout

    def forward(self, projection: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Maps what `first` makes of vectors to z [N, rank]; unknown rows get the default.

        Args:
            projection: [N, width of `first`], see `project`.
            known: bool [N].

        Returns:
            z, and which rows of it read their vector, bool [N]: `known` less what was dropped.
        """
        if self.training and self.noise:
            projection = projection + self._projected_noise(len(projection))
        if self.training and self.dropout:
            known = known & (torch.rand(known.shape, device=known.device) >= self.dropout)
        return torch.where(known[:, None], self.rest(projection), self.default), known

    def all_codes(self, vectors: Tensor) -> Tensor:
        """Codes of undisturbed vectors [S, dim], as a last row the default: [S + 1, rank]."""
        return torch.cat([self.rest(self.first(vectors)), self.default[None]])

    def _projected_noise(self, rows: int) -> Tensor:
        """What noise on the vectors becomes behind the first projection W, [rows, width of it].

        Where W makes fewer numbers than it reads, drawn behind it, where it is normal with covariance
        W W^T: a draw of `width`, not of `dim`, numbers per row. A trace of noise of its own keeps the
        factorisation defined if W has dependent rows; a wider W always has.
        """
        weight = self.first.weight.float()
        width, dim = weight.shape
        if width >= dim:
            drawn = torch.randn(rows, dim, device=weight.device)
            return self.noise / math.sqrt(dim) * drawn @ weight.t()
        covariance = weight @ weight.t()
        jitter = 1e-5 * covariance.diagonal().mean() * torch.eye(width, device=weight.device)
        # Without a check, which would wait for the GPU.
        factor, _ = torch.linalg.cholesky_ex(covariance + jitter)
        drawn = torch.randn(rows, width, device=weight.device)
        return self.noise / math.sqrt(dim) * drawn @ factor.t()


@dataclass(frozen=True)
class Generator:
    """How meta layers are generated; one for all layers of a model.

    Attributes:
        rank: Width of z.
        kind: low_rank (W is a sum of rank matrices), core (a generated core_width x core_width matrix
            between two shared ones) or gate (a generated diagonal on a shared matrix).
        core_width: Of kind core.
        residual: Layers start without a say; else they start as random layers, the paper's form.
        strategy: Of the op, see `trainer.ops.meta_linear`.
    """

    rank: int
    kind: str = "low_rank"
    core_width: int = 16
    residual: bool = True
    strategy: str = "auto"


def _uniform(*shape: int) -> Tensor:
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(*shape).uniform_(-bound, bound)


class MetaLayer(nn.Module):
    """One generated layer W(z) = W_0 + sum_j z_j A_j, b(z) = c_0 + sum_j z_j c_j.

    With `generator.residual` it begins with A = 0 and c = 0, so that knowledge has no say until it is
    learned.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        generator: Kind, rank, strategy.
        zero: Begin with an output of 0, whatever z is.
    """

    def __init__(
        self, in_features: int, out_features: int, generator: Generator, zero: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.rank, self.strategy = generator.kind, generator.rank, generator.strategy
        slices, core = generator.rank + 1, generator.core_width
        if self.kind == "gate":
            self.shared = nn.Parameter(_uniform(out_features, in_features))
            scale = torch.zeros(slices, out_features)
            if not (generator.residual or zero):
                scale[:-1].normal_(std=1 / math.sqrt(generator.rank))
            scale[-1] = 0.0 if zero else 1.0
            self.scale = nn.Parameter(scale)
            self.bias = nn.Parameter(torch.zeros(slices, out_features))
            return
        o, i = (core, core) if self.kind == "core" else (out_features, in_features)
        weight = torch.zeros(slices, o, i)
        if not (generator.residual or zero):
            weight[:-1].normal_(std=1 / math.sqrt(i * generator.rank))
        if self.kind == "core":
            weight[-1] = torch.eye(core)  # starts as the product of the shared matrices
            up = torch.zeros(out_features, core) if zero else _uniform(out_features, core)
            self.down, self.up = nn.Parameter(_uniform(core, in_features)), nn.Parameter(up)
        elif not zero:
            weight[-1] = _uniform(o, i)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(slices, o))

    def forward(
        self, h: Tensor, z: Tensor, group: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """Maps h [B, in] to [B, out] by the layer that z [B, rank] (or z[group]) generates."""
        # "grouped" speaks of shared vectors; without a group every sample has its own.
        ungrouped = group is None and self.strategy == "grouped"
        options: dict[str, Any] = {
            "group": group,
            "activation": activation,
            "strategy": "auto" if ungrouped else self.strategy,
        }
        if self.kind == "core":
            return meta_core(h, z, self.down, self.weight, self.bias, self.up, **options)
        if self.kind == "gate":
            return meta_gate(h, z, self.shared, self.scale, self.bias, **options)
        return meta_linear(h, z, self.weight, self.bias, **options)

    def explain(
        self, rows: int, groups: int | None, device: str, dtype: torch.dtype = torch.float32
    ) -> str:
        """One line: which implementation a batch of `rows` takes, and why.

        Args:
            rows: Samples on this rank.
            groups: Distinct knowledge rows, or None where every sample has its own.
            device: "cpu" or "cuda".
            dtype: Of the products.
        """
        strategy = "auto" if groups is None and self.strategy == "grouped" else self.strategy
        is_gate = self.kind == "gate"
        widths = (self.scale if is_gate else self.weight).shape[1:]
        line = explain_strategy(
            *(rows, self.rank, widths[-1], widths[0]),
            groups=groups,
            device=device,
            dtype=dtype,
            strategy=strategy,
            diagonal=is_gate,
        )
        if self.kind != "low_rank":
            what = f"meta {self.kind} of {self.in_features} to {self.out_features}:"
            line = line.replace("meta layer", what, 1)
        return line


class UserMetaLayers(nn.Module):
    """User-level meta layers at the bottom: [B, width] to [B, width], by each sample's z_u."""

    def __init__(self, width: int, layers: int, generator: Generator) -> None:
        super().__init__()
        self.residual = generator.residual
        self.layers = nn.ModuleList(
            MetaLayer(width, width, generator, zero=self.residual) for _ in range(layers)
        )

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Applies h + W(z)h + b(z) (residual) or leaky_relu(W(z)h + b(z)) (linear), layer by layer."""
        for layer in self.layers:
            h = h + layer(h, z) if self.residual else layer(h, z, activation="leaky_relu")
        return h


class ScenarioMetaLayers(nn.Module):
    """Scenario-level meta layers in parallel to the backbone: a generated stack, and its fusion.

    fusion: sum adds the stack's own logits to the backbone's; concat adds a small network of both the
    backbone's logits and the stack's output; gate scales the backbone's logits by a factor in (0, 2)
    that the stack computes, besides the sum. Each begins as the backbone alone in the residual form.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        layers: int,
        generator: Generator,
        num_tasks: int,
        fusion: str = "sum",
    ) -> None:
        super().__init__()
        self.fusion = fusion
        widths = [in_features] + [width] * layers
        self.layers = nn.ModuleList(
            MetaLayer(widths[i], widths[i + 1], generator) for i in range(layers)
        )
        if fusion == "concat":
            self.hidden = MLP(width + num_tasks, [width], dropout=0.0)
        if fusion == "gate":
            self.gate = nn.Linear(width, num_tasks)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.out = nn.Linear(width, num_tasks)
        if generator.residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor, z: Tensor, group: Tensor, logits: Tensor) -> Tensor:
        """Fuses the backbone's logits with the branch.

        Args:
            h: Bottom input [B, in].
            z: Codes of the scenarios [S + 1, rank].
            group: Row of z per sample, int64 [B].
            logits: Of the backbone [B, tasks].

        Returns:
            Logits [B, tasks].
        """
        for layer in self.layers:
            h = layer(h, z, group, activation="leaky_relu")
        if self.fusion == "concat":
            return logits + self.out(self.hidden(torch.cat([h, logits], dim=1)))
        if self.fusion == "gate":
            logits = 2 * torch.sigmoid(self.gate(h)) * logits
        return logits + self.out(h)


def alignment_loss(
    user: Tensor, scenario: Tensor, store: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Pulls a user's code towards the codes of the scenarios where this user said yes.

    Cross-entropy over scenarios of the cosine between z_u and each z_s, at temperature 0.2: both levels
    then speak of tastes in one space. Scenarios of other dates are none of the classes: those of later
    ones tell what the event's time did not know, and the same scenario's are no other scenario.

    Args:
        user: z_u [B, rank].
        scenario: z_s of all rows of the scenario's stores [S, rank].
        store: Which of the stores, dated each, a row is of, int64 [S].
        target: Row of each sample, int64 [B], in [0, S).
        weight: Share of each sample in the loss [B]; 0 leaves it out.

    Returns:
        The sum over samples divided by B, a scalar.
    """
    scores = F.normalize(user, dim=1) @ F.normalize(scenario, dim=1).t() / 0.2
    scores = scores.masked_fill(store[target][:, None] != store, -torch.inf)
    losses = F.cross_entropy(scores, target, reduction="none")
    return (losses * weight).sum() / len(user)


class KnowledgeMatch(nn.Module):
    """How well a user's knowledge meets an item's: elementwise product of projections, and cosine.

    A linear layer reads them besides a small network: with it the match is a bilinear form from the
    first step on, without it the ids have learned the training events by heart before it is one.

    With meta layers on it, what the match means is generated too: one residual layer by z_u, one by
    z_s (a match of tastes may count for more in search than in a feed).

    Args:
        user_dim: Width of user vectors.
        item_dim: Width of item vectors; the cosine is left out if it differs.
        width: Width of the projections.
        num_tasks: Logits per sample.
        meta: Levels whose knowledge generates a layer on the match: "user", "scenario".
        generator: Of these layers.
        dropout: Share of samples that go without the match (training only).
    """

    def __init__(
        self,
        user_dim: int,
        item_dim: int,
        width: int,
        num_tasks: int,
        meta: tuple[str, ...] = (),
        generator: Generator | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.user = nn.Linear(user_dim, width, bias=False)
        self.item = nn.Linear(item_dim, width, bias=False)
        nn.init.normal_(self.user.weight)
        nn.init.normal_(self.item.weight)
        self.has_cosine = user_dim == item_dim
        features = width + int(self.has_cosine)
        self.meta = nn.ModuleDict()
        for level in meta:
            assert generator is not None
            self.meta[level] = MetaLayer(features, features, generator, zero=True)
        self.hidden = MLP(features, [16], dropout=0.0)
        self.out = nn.Linear(16 + features, num_tasks, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        projections: tuple[Tensor, Tensor],
        users: Tensor,
        items: Tensor,
        known: Tensor,
        codes: dict[str, tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """Maps knowledge of both sides to logits [B, tasks]; 0 where `known` is false or dropped.

        Args:
            projections: What `user` and `item` make of the vectors, [B, width] each, see `project`.
            users: User vectors [B, user_dim].
            items: Item vectors [B, item_dim].
            known: Whether both are there, bool [B].
            codes: z per level and, where rows are shared, the row of each sample.
        """
        features = projections[0] * projections[1]
        if self.has_cosine:
            # Cosines of one encoder's texts lie in a narrow band; widened to the scale of the others.
            cosine = 5 * (users * items).sum(dim=1, keepdim=True)
            features = torch.cat([features, cosine], dim=1)
        for level, layer in self.meta.items():
            features = features + layer(features, *codes[level])
        if self.training and self.dropout:
            known = known & (torch.rand(known.shape, device=known.device) >= self.dropout)
        both = torch.cat([self.hidden(features), features], dim=1)
        return self.out(both) * known[:, None]
