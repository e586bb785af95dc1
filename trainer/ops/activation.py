"""Activations that an op can fuse: those whose gradient follows from their output alone."""

from collections.abc import Callable

import torch
from torch import Tensor

_SLOPE = 0.01  # of leaky_relu below 0, as in torch.nn.functional

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu_,
    "leaky_relu": lambda z: torch.nn.functional.leaky_relu_(z, _SLOPE),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, y: dy,
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "leaky_relu": lambda dy, y: torch.ops.aten.leaky_relu_backward(dy, y, _SLOPE, True),
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
}
ACTIVATIONS = tuple(_FORWARD)


def activate(z: Tensor, activation: str) -> Tensor:
    """Applies one of ACTIVATIONS, differentiably."""
    return {
        "none": lambda x: x,
        "relu": torch.relu,
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, _SLOPE),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }[activation](z)


def activate_(z: Tensor, activation: str) -> Tensor:
    """Applies one of ACTIVATIONS in place and returns the tensor."""
    return _FORWARD[activation](z)


def activation_gradient(dy: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient dy act'(z), from the output y = act(z); `dy` itself for "none"."""
    return _BACKWARD[activation](dy, y)


def activation_name(activation: str | None) -> str:
    """The name an op takes for what a caller wrote.

    Raises:
        ValueError: If no such activation can be fused.
    """
    name = "none" if activation is None else activation
    if name not in _FORWARD:
        raise ValueError(
            f"unknown activation {activation!r}; use None or one of {', '.join(ACTIVATIONS[1:])}"
        )
    return name
