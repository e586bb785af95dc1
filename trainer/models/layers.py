"""Layers that several backbones share. Plain integers and tensors, no configuration."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.ops import grouped_linear, take_rows

# The bottom input is six blocks of one width: four fields and two products of them.
BLOCKS = 6
USER, ITEM, SCENARIO, HISTORY = range(4)


class Dropout(nn.Module):
    """Dropout of a share of the elements, the others scaled up; on a CPU a fifth of `nn.Dropout`'s time.

    PyTorch draws a double per element there, 16 random bits do: the share is exact to 1 in 65,536.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of any shape to one like it; in evaluation to itself."""
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        dropped = min(round(self.share * 65_536), 65_535)
        # Whole words: a draw of fewer bits leaves their sign 0.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (bits >= dropped - 32_768).to(x.dtype).mul_(65_536 / (65_536 - dropped))

    def extra_repr(self) -> str:
        """What is printed in the module's brackets."""
        return f"share={self.share}"


class MLP(nn.Sequential):
    """Linear, ReLU, dropout per width: [B, in] to [B, widths[-1]]."""

    def __init__(self, in_features: int, widths: list[int], dropout: float) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise([in_features, *widths]):
            layers += [nn.Linear(i, o), nn.ReLU(), Dropout(dropout)]
        super().__init__(*layers)


class GroupedLinear(nn.Module):
    """One linear layer per scenario: [B, in] and the scenario of each sample [B] to [B, out]."""

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(
            torch.empty(num_groups, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(num_groups, out_features))

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Applies to each sample the layer of its group."""
        return grouped_linear(x, self.weight, self.bias, group)


class BottomWidth(int):
    """Width of a bottom input that goes on behind its six blocks: an integer that knows where they end.

    Backbones are told one number. Those that read single blocks ask `block_width` for theirs.
    """

    dim: int

    def __new__(cls, dim: int, further: int = 0) -> "BottomWidth":
        """Six blocks of width `dim`, and `further` columns behind them."""
        width = super().__new__(cls, BLOCKS * dim + further)
        width.dim = dim
        return width


def block_width(in_features: int) -> int:
    """Width of one of the six blocks of the bottom input.

    Raises:
        ValueError: If the input is a plain number that six equal blocks do not add up to.
    """
    if isinstance(in_features, BottomWidth):
        return in_features.dim
    if in_features % BLOCKS:
        raise ValueError(
            f"in_features = {in_features} is not divisible by {BLOCKS}; this backbone reads the bottom input "
            "as equal blocks: user, item, scenario, history, user*item, history*item"
        )
    return in_features // BLOCKS


def block(x: Tensor, which: int, width: int) -> Tensor:
    """One block [B, width] of the bottom input [B, in]; user-level meta layers before it mix the blocks."""
    return x[:, which * width : (which + 1) * width]


def mix(experts: Tensor, scores: Tensor) -> Tensor:
    """Sums of experts [B, E, o], weighted by softmax of scores [B, T, E]: [B, T, o]."""
    if scores.shape[1] == 1:  # for a CPU, B products of a row and a small matrix are slower
        return (scores.softmax(dim=-1)[:, 0, :, None] * experts).sum(1, keepdim=True)
    return scores.softmax(dim=-1) @ experts


class ParallelLinear(nn.Module):
    """Several linear layers at once: [B, in], or an input for each [B, num, in], to [B, num, out]."""

    def __init__(self, num: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(
            torch.empty(num, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(num, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Applies layer e to x, or to x[:, e]."""
        if x.dim() == 2:  # one product for all layers
            y = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
            return y.unflatten(1, self.bias.shape)
        if self.weight.shape[1] == 1:  # no product, whose gradient DDP's buckets would copy
            return (x * self.weight[:, 0]).sum(-1, keepdim=True) + self.bias
        # Features innermost, as elementwise operations and their gradients like it.
        y = torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight.transpose(1, 2))
        return y.transpose(0, 1)


class Experts(nn.Module):
    """Several MLPs of one shape on one input: [B, in] to [B, num, widths[-1]]."""

    def __init__(self, num: int, in_features: int, widths: list[int], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ParallelLinear(num, i, o) for i, o in itertools.pairwise([in_features, *widths])
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Applies all experts to each sample; x may also be an input for each, [B, num, in]."""
        for layer in self.layers:
            x = self.dropout(layer(x).relu())
        return x


def own_groups(scenario: Tensor, num: int) -> Tensor:
    """Numbers the `num` members that each scenario owns: int64 [B] to int64 [B * num]."""
    members = torch.arange(num, device=scenario.device)
    return (scenario[:, None] * num + members).flatten()


class OwnExperts(nn.Module):
    """Experts of each scenario: [B, in] to [B, num, widths[-1]], a sample meeting only its scenario's."""

    def __init__(
        self, num_scenarios: int, num: int, in_features: int, widths: list[int], dropout: float
    ) -> None:
        super().__init__()
        self.num = num
        self.layers = nn.ModuleList(
            GroupedLinear(num_scenarios * num, i, o)
            for i, o in itertools.pairwise([in_features, *widths])
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Applies expert e of scenario[b] to x[b], or to x[b, e] if x is [B, num, in]."""
        if x.dim() == 2:
            x = x[:, None].expand(-1, self.num, -1)
        h, group = x.flatten(0, 1), own_groups(scenario, self.num)
        for layer in self.layers:
            h = self.dropout(layer(h, group).relu())
        return h.unflatten(0, (len(scenario), self.num))


class Towers(nn.Module):
    """A tower of one hidden layer, half as wide as its input, per scenario and task."""

    def __init__(
        self, num_scenarios: int, num_tasks: int, in_features: int, dropout: float
    ) -> None:
        super().__init__()
        width = max(in_features // 2, 1)
        self.hidden = OwnExperts(num_scenarios, num_tasks, in_features, [width], dropout)
        self.out = GroupedLinear(num_scenarios * num_tasks, width, 1)

    def forward(self, h: Tensor, scenario: Tensor) -> Tensor:
        """Maps [B, in], or an input for each task [B, tasks, in], to logits [B, tasks]."""
        h = self.hidden(h, scenario)
        tasks = h.shape[1]
        return self.out(h.flatten(0, 1), own_groups(scenario, tasks)).view(-1, tasks)


class ScenarioAffine(nn.Module):
    """A scale and a shift per scenario: x * scale[s] + shift[s], beginning as the identity."""

    def __init__(self, num_scenarios: int, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_scenarios, features))
        self.shift = nn.Parameter(torch.zeros(num_scenarios, features))

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """Maps [B, features] to [B, features]."""
        return x * take_rows(self.scale, scenario) + take_rows(self.shift, scenario)


class GateUnit(nn.Module):
    """The gate of PEPNet: 2 sigmoid(W' relu(W z + b) + b'), [B, in] to factors in (0, 2)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, out_features), nn.ReLU(), nn.Linear(out_features, out_features)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Computes one factor per output; about 1 at the start."""
        return 2 * self.layers(z).sigmoid()
