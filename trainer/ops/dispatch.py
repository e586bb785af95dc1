"""How the ops reach PyTorch: as operators where something looks at operators, else by a shorter way.

A registered operator (`torch.library.custom_op`) is what the compiler, fake tensors and counters of FLOPs
need; in eager training each call of one costs tens of microseconds on the host, as much as a small layer.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

AUTOCAST_TYPE = torch.bfloat16  # to which autocast casts our inputs, whatever its own type


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; some have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Where products are made in the type of their operands.

    The backward pass needs it: for whoever takes gradients inside autocast, some of its products would
    be cast to a type of which the others know nothing.
    """
    device = like.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether ordinary tensors meet neither a compiler nor a mode that watches operators."""
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and all(type(tensor) in (Tensor, Parameter) and not tensor.is_meta for tensor in tensors)
    )


def apply_function(
    function: type[torch.autograd.Function], tensors: tuple[Tensor, ...], *rest: Any
) -> Tensor:
    """Applies it under the autocast rule that the operators have: casts inputs, float64 excepted."""
    if not autocasts(tensors[0].device.type):
        return function.apply(*tensors, *rest)  # type: ignore[no-untyped-call]
    cast = [
        tensor if tensor.dtype == torch.float64 else tensor.to(AUTOCAST_TYPE) for tensor in tensors
    ]
    with without_autocast(tensors[0]):
        return function.apply(*cast, *rest)  # type: ignore[no-untyped-call]
