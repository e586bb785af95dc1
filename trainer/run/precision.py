"""How wide the products of the dense part are: chosen once per run, from the configuration and the device."""

import torch

from trainer.config.train import Precision


def choose_precision(configured: Precision | None, device: str) -> Precision:
    """The precision of a run: as configured, else bf16 on a GPU and float32 on a CPU.

    Args:
        configured: `train.precision`.
        device: Type of the device, "cuda" or "cpu". A CPU has no tf32: it takes float32 instead.
    """
    if configured is None:
        return "bf16" if device == "cuda" else "float32"
    if configured == "tf32" and device != "cuda":
        return "float32"
    return configured


def set_precision(precision: Precision) -> None:
    """Sets torch's switch for float32 products on GPUs, which kernels of ours read as well."""
    # By the name that torch has had since 2.9: the older `allow_tf32` raises where both are set.
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
