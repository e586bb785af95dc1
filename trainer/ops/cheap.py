"""Cheaper relatives of `meta_linear` for wide layers: a generated core, and a generated diagonal.

One family, from cheap to expensive: gate (a diagonal is generated), core (m x m numbers), the full
layer (o x i numbers). All take the same `weight`-and-`bias` stacks of r+1 slices, the last being the
part that does not depend on knowledge, so that g = 0 leaves an ordinary layer.
"""

import torch.nn.functional as F
from torch import Tensor

from trainer.ops.activation import activate, activation_name
from trainer.ops.meta_linear import meta_linear


def meta_core(
    h: Tensor,
    g: Tensor,
    down: Tensor,
    weight: Tensor,
    bias: Tensor,
    up: Tensor,
    *,
    group: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
) -> Tensor:
    """A wide generated layer of rank m: y_b = act(up (S_b (down h_b) + b_b)).

    S_b = weight_r + sum_j g_bj weight_j is m x m and b_b likewise, by `meta_linear`. Costs
    2 B (i m + (r+1) m^2 + m o) multiplications and additions forward in place of 2 B (r+1) i o: at
    r = 32, i = o = 512, m = 32 a hundred and thirty times fewer.

    Args:
        h: Layer inputs [B, i].
        g: Knowledge vectors [B, r]; with `group`, the distinct ones [S, r].
        down: Shared factor [m, i].
        weight: Slices of the core [r+1, m, m].
        bias: Their biases [r+1, m].
        up: Shared factor [o, m].
        group: Which row of `g` belongs to each sample, int64 [B].
        activation: As in `meta_linear`.
        strategy: As in `meta_linear`, of the core.

    Returns:
        Outputs [B, o].

    Raises:
        ValueError: If the core's shapes do not fit, or the strategy or activation is unknown.
    """
    name = activation_name(activation)
    core = meta_linear(F.linear(h, down), g, weight, bias, group=group, strategy=strategy)
    return activate(F.linear(core, up), name)


def meta_gate(
    h: Tensor,
    g: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    group: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
) -> Tensor:
    """A layer whose rows are scaled by knowledge: y_b = act(s_b * (weight h_b) + b_b).

    s_b = scale_r + sum_j g_bj scale_j and b_b likewise, by `meta_linear` with slices that are diagonals.
    One product of h and two small ones of g take 2 B (i + 2 r) o operations in place of 2 B (r+1) i o.

    Args:
        h: Layer inputs [B, i].
        g: Knowledge vectors [B, r]; with `group`, the distinct ones [S, r].
        weight: The layer [o, i].
        scale: Diagonals [r+1, o]; the last one is the scale without knowledge, usually 1.
        bias: Biases [r+1, o].
        group: Which row of `g` belongs to each sample, int64 [B].
        activation: As in `meta_linear`.
        strategy: As in `meta_linear`, of the diagonals.

    Returns:
        Outputs [B, o].

    Raises:
        ValueError: If shapes do not fit, or the strategy or activation is unknown.
    """
    expected = (g.shape[-1] + 1, weight.shape[0])
    if scale.shape != expected or bias.shape != expected:
        raise ValueError(
            f"meta_gate: scale {tuple(scale.shape)} and bias {tuple(bias.shape)} must be {expected}"
        )
    return meta_linear(
        F.linear(h, weight), g, scale, bias, group=group, activation=activation, strategy=strategy
    )
