"""Shortcuts through the libraries' CPU paths, which patch private parts: `sharding.shard` takes them."""

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.cpu.sequence_lookup import look_up_as_bags
from embeddings.cpu.single_rank import skip_distribution


def take_shortcuts(model: DistributedModelParallel, device: torch.device) -> None:
    """Patches a sharded model in place; vectors, gradients and checkpoints stay what they were."""
    if dist.get_world_size() == 1:
        skip_distribution(model)
    if device.type == "cpu":
        look_up_as_bags(model)
