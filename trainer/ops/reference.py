"""The op in plain PyTorch: a loop over the r+1 slices, scaled after the product. Any device.

It registers two pairs of operators, forward and backward, that compute the same numbers:
`llm4msr::meta_linear` by this loop, and `llm4msr::meta_linear_fused` by the Triton kernels, which also
has kernels for slices that are diagonals (without them `diagonal_linear` is all it takes). They are
opaque to the compiler (`custom_op`, not `triton_op`: that one is traced into its launch, so that it
cannot be compiled on a machine without a GPU). Where no compiler looks, the same functions are called
without the operators' detour. What is saved for the backward pass: the inputs, and the output where
there is an activation.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import once_differentiable

from trainer.ops.activation import activate, activate_, activation_gradient
from trainer.ops.dispatch import AUTOCAST_TYPE, apply_function, is_plain_eager, without_autocast
from trainer.ops.grouped import take_rows
from trainer.ops.warp_specialised import specialised_forward, specialised_gradients

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def reference_forward(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """Outputs [B, o] of `trainer.ops.meta_linear`, summed in float32 at least."""
    if h.dtype == torch.float16:  # whose range a product may leave before g scales it down
        wide_inputs = (h.float(), g.float(), weight.float(), bias.float())
        return reference_forward(*wide_inputs, activation).half()
    wide = _accumulator(h.dtype)
    y = torch.addmm(bias[-1].to(wide), g.to(wide), bias[:-1].to(wide))
    y += h @ weight[-1].t()
    u = h.new_empty(h.shape[0], weight.shape[1])
    for j in range(g.shape[1]):
        torch.mm(h, weight[j].t(), out=u)
        y.addcmul_(g[:, j : j + 1], u)
    return activate_(y, activation).to(h.dtype)


def reference_backward(dz: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Gradients:
    """Gradients of the inputs, from dz [B, o]: the gradient before the activation.

    V_j = dz A_j serves both dh (scaled by g_j) and dg_j (its inner product with h): two products per
    slice in all, as many as if the forward pass had stored something.
    """
    if h.dtype == torch.float16:
        wide_gradients = reference_backward(
            *(tensor.float() for tensor in (dz, h, g, weight, bias))
        )
        dh, dg, dweight, dbias = (tensor.half() for tensor in wide_gradients)
        return dh, dg, dweight, dbias
    wide = _accumulator(h.dtype)
    dh = (dz @ weight[-1]).to(wide)
    dg = (dz @ bias[:-1].t()).to(wide)
    # Not empty_like: the compiler was told that these are contiguous, whatever the strides of the inputs.
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    torch.mm(dz.t(), h, out=dweight[-1])
    dbias[-1] = dz.sum(0)
    dbias[:-1] = g.t() @ dz
    v, scaled = torch.empty_like(h), torch.empty_like(dz)
    for j in range(g.shape[1]):
        gate = g[:, j : j + 1]
        torch.mm(dz, weight[j], out=v)
        dh.addcmul_(gate, v)
        dg[:, j] += v.mul_(h).sum(1, dtype=wide)
        torch.mul(gate, dz, out=scaled)
        torch.mm(scaled.t(), h, out=dweight[j])
    return dh.to(h.dtype), dg.to(g.dtype), dweight, dbias


def diagonal_linear(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, group: Tensor | None, activation: str
) -> Tensor:
    """Outputs [B, o] where slices are diagonals [r+1, o]: two small products, a multiplication, a sum.

    With `group`, scales and biases are made once per row of `g`. An operator of our own that saves no
    scales for the backward pass was no faster on a CPU (docs/results/meta-layer.md); the compiler
    sees through this.
    """
    scales, biases = (F.linear(g, slices[:-1].t(), slices[-1]) for slices in (weight, bias))
    if group is not None:
        scales, biases = take_rows(scales, group), take_rows(biases, group)
    return activate(scales * h.to(scales.dtype) + biases, activation)


def _reference_gradients(
    dy: Tensor, y: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Gradients:
    with without_autocast(h):
        dz = activation_gradient(dy, y, activation)
        return reference_backward(dz.contiguous(), h.contiguous(), g, weight, bias)


def _kernels(weight: Tensor) -> ModuleType:
    """The kernels for slices of a shape. Imported late: triton may be missing."""
    from trainer.ops import triton_diagonal, triton_meta

    return triton_diagonal if weight.dim() == 2 else triton_meta


def _fused_forward(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The Triton kernel: CUDA, or a CPU under Triton's interpreter."""
    from trainer.ops.triton_tiles import INTERPRETING

    if not (h.is_cuda or INTERPRETING):
        raise ValueError("meta_linear: strategy fused needs CUDA tensors; on a CPU use reference")
    return _kernels(weight).fused_forward(h, g, weight, bias, activation)


def _fused_gradients(
    dy: Tensor, y: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Gradients:
    with without_autocast(h):
        dz = activation_gradient(dy, y, activation)
        return _kernels(weight).fused_backward(dz, h, g, weight, bias)


def _fake_forward(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[1])


def _fake_backward(
    dy: Tensor, y: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Gradients:
    return (
        h.new_empty(h.shape),
        g.new_empty(g.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.activation = inputs[:5]
    # Without an activation the gradient has no use for the output; an input stands in for it.
    y = tensors[0] if ctx.activation == "none" else output
    ctx.save_for_backward(y, *tensors)


def _operators(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., Gradients]
) -> CustomOpDef:
    """Registers a pair of operators, with their shapes, gradient and autocast rule."""
    op = torch.library.custom_op(f"llm4msr::{name}", forward, mutates_args=())
    gradients = torch.library.custom_op(f"llm4msr::{name}_backward", backward, mutates_args=())
    op.register_fake(_fake_forward)
    gradients.register_fake(_fake_backward)

    def gradient(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        y, *tensors = ctx.saved_tensors
        return *gradients(dy.contiguous(), y, *tensors, ctx.activation), None

    op.register_autograd(gradient, setup_context=_save)
    # Without a cast rule a mixed-dtype call fails inside the op, or returns a dtype that the fake denies.
    for device in ("cpu", "cuda"):
        op.register_autocast(device, AUTOCAST_TYPE)
    return op


class _Eager(torch.autograd.Function):
    """A pair of functions where nobody looks at operators (`is_plain_eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *arguments, forward, ctx.gradients = inputs
        y = forward(*arguments)
        _save(ctx, arguments, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients(dy.contiguous(), *ctx.saved_tensors, ctx.activation)
        return *gradients, None, None, None


_reference = _operators("meta_linear", reference_forward, _reference_gradients)
_fused = _operators("meta_linear_fused", _fused_forward, _fused_gradients)


def meta_linear_reference(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """The loop, on any device."""
    tensors = (h, g, weight, bias)
    if is_plain_eager(*tensors):
        return apply_function(_Eager, tensors, activation, reference_forward, _reference_gradients)
    return _reference(*tensors, activation)


def meta_linear_fused(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """The Triton kernels: CUDA, or a CPU under Triton's interpreter."""
    tensors = (h, g, weight, bias)
    if is_plain_eager(*tensors):
        return apply_function(_Eager, tensors, activation, _fused_forward, _fused_gradients)
    return _fused(*tensors, activation)


def meta_linear_specialised(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """The warp-specialised kernels, on an H100 or H200; no operators, since they have never run."""
    tensors = (h, g, weight, bias)
    return apply_function(_Eager, tensors, activation, specialised_forward, specialised_gradients)
