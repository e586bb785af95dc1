"""Named resources: one host of a common kind, less what its system needs.

Cores and memory are those of NVIDIA's DGX systems of the generation, rounded down. Register your own
under the entry point `torchx.named_resources`, or write it into the job file.
"""

from torchx.specs import Resource

GIB = 1024


def cpu() -> Resource:
    """A small host without GPUs."""
    return Resource(cpu=2, gpu=0, memMB=8 * GIB)


def a100x8() -> Resource:
    """8 A100 of 80 GB."""
    return Resource(cpu=96, gpu=8, memMB=1600 * GIB)


def h100x8() -> Resource:
    """8 H100 of 80 GB."""
    return Resource(cpu=96, gpu=8, memMB=1600 * GIB)


def h200x8() -> Resource:
    """8 H200 of 141 GB."""
    return Resource(cpu=96, gpu=8, memMB=1600 * GIB)
