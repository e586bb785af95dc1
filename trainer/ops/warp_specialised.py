"""The strategy `warp_specialised`: launches the Gluon kernels of the forward pass and of its gradient.

Never run on a GPU, and Gluon has no interpreter: registers, shared memory and instructions are known from
the compiler, numbers are not. The weights' gradient is that of strategy fused.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.ops.activation import activation_gradient
from trainer.ops.dispatch import without_autocast

ROWS, DEPTH, WIDEST = 128, 64, 512  # rows of a program, depth of a block, most that stays on chip
_HOPPER = (9, 0)


class Ring(NamedTuple):
    """Columns of a program, and cells of its ring of blocks."""

    columns: int
    cells: int


def ring_of(kernel: str, depth: int) -> Ring:
    """What fits into 227 KB beside the rows that stay, without a register spilled.

    Args:
        kernel: "forward" or "backward_input".
        depth: Length of its inner products, at most 512.
    """
    if depth <= 256:
        return Ring(128, 6)
    return Ring(128, 4) if kernel == "forward" else Ring(64, 8)


def missing_for_warp_specialised(device: str) -> str | None:
    """What the strategy lacks on a device, "cpu" or "cuda"; None where it can be launched."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if device != "cuda":
        return "CUDA"
    capability = torch.cuda.get_device_capability()
    if capability != _HOPPER:
        return "a GPU of compute capability 9.0 (H100, H200), not {}.{}".format(*capability)
    return None


def refuse(h: Tensor, weight: Tensor) -> None:
    """Refuses layers that the kernels were not written for.

    Args:
        h: Layer inputs [B, i], as cast.
        weight: Slices [r+1, o, i].

    Raises:
        ValueError: Names what is needed, and the strategy that has it.
    """
    lacking = missing_for_warp_specialised(h.device.type)
    if lacking is None and weight.dim() == 2:
        lacking = "full slices, not diagonals"
    if lacking is None and h.dtype != torch.bfloat16:
        lacking = f"bfloat16 (train.precision: bf16), not {str(h.dtype).removeprefix('torch.')}"
    if lacking is None and max(weight.shape[1:]) > WIDEST:
        lacking = f"widths of at most {WIDEST}, not {max(weight.shape[1:])}"
    if lacking:
        raise ValueError(f"meta_linear: strategy warp_specialised needs {lacking}; use auto")


def specialised_forward(
    h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """Gives y [B, o] of `trainer.ops.meta_linear`; see `refuse` for what it takes."""
    from trainer.ops.experimental import warp_specialised as kernels
    from trainer.ops.triton_tiles import ACTIVATION_CODES, padded, transposed_gates

    refuse(h, weight)
    (rows, width_in), width_out = h.shape, weight.shape[1]
    if rows * width_in * width_out == 0:
        from trainer.ops.triton_meta import fused_forward

        return fused_forward(h, g, weight, bias, activation)
    h = padded(h, width_in, to=DEPTH)
    weight = padded(weight, width_in, width_out, to=DEPTH)
    bias, gates = padded(bias, width_out, to=DEPTH), transposed_gates(g)
    slices, o, i = weight.shape
    ring = ring_of("forward", i)
    y = h.new_empty(rows, o)
    with torch.cuda.device_of(h):
        kernels.specialised_forward[-(-rows // ROWS), -(-o // ring.columns)](
            _described(h, ROWS // 2, DEPTH),
            _described(weight.view(slices * o, i), ring.columns, DEPTH),
            *(gates, bias, y, rows, slices - 1, o, gates.shape[1]),
            ACTIVATION=ACTIVATION_CODES[activation],
            **_constants(ring, i),
        )
    return y[:, :width_out].contiguous()


def specialised_gradients(
    dy: Tensor, y: Tensor, h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives dh [B, i], dg [B, r], dweight [r+1, o, i] and dbias [r+1, o]."""
    from trainer.ops import triton_meta
    from trainer.ops.triton_tiles import padded, transposed_gates

    with without_autocast(h):
        dz = activation_gradient(dy, y, activation)
        (rows, width_in), width_out = h.shape, weight.shape[1]
        if rows * width_in * width_out == 0:
            return triton_meta.fused_backward(dz, h, g, weight, bias)
        dbias = torch.cat([g.t() @ dz, dz.sum(0, keepdim=True)])
        # In float32: both parts of dg are rounded once, when they have met.
        dg_of_bias = dz.float() @ bias[:-1].float().t()
        gates = transposed_gates(g)
        dz, h = padded(dz, width_out, to=DEPTH), padded(h, width_in, to=DEPTH)
        weight = padded(weight, width_in, width_out, to=DEPTH)
        dh, dg = _backward_input(dz, h, gates, weight)
        dweight = triton_meta.launch_backward_weight(dz, h, gates, weight)
        return (
            dh[:, :width_in].contiguous(),
            (dg.t() + dg_of_bias).to(g.dtype),
            dweight[:, :width_out, :width_in].contiguous(),
            dbias,
        )


def _backward_input(dz: Tensor, h: Tensor, gates: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dh [B, i] and, float32 [r, B], what weights give to dg; widths are multiples of 64."""
    from trainer.ops.experimental import warp_specialised as kernels

    slices, o, i = weight.shape
    rows, ring = len(h), ring_of("backward_input", o)
    tiles = -(-i // ring.columns)
    dh = torch.empty_like(h)
    dg = h.new_empty(tiles, slices, rows, dtype=torch.float32)
    with torch.cuda.device_of(h):
        kernels.specialised_backward_input[-(-rows // ROWS), tiles](
            _described(dz, ROWS // 2, DEPTH),
            _described(weight.view(slices * o, i), DEPTH, ring.columns),
            *(gates, h, dh, dg, rows, slices - 1, i, o, gates.shape[1]),
            **_constants(ring, o),
        )
    return dh, dg[:, :-1].sum(0)


def _described(matrix: Tensor, rows: int, columns: int) -> object:
    """A matrix of bfloat16 as TMA copies it, in blocks of that many rows and columns."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


def _constants(ring: Ring, depth: int) -> dict[str, int]:
    sizes = {"BN": ring.columns, "BK": DEPTH, "STEPS": depth // DEPTH, "STAGES": ring.cells}
    return sizes | {"num_warps": 4}
