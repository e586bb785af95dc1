"""On a single rank nothing has to travel: ids and vectors go straight to and from the kernel."""

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingDist
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingDist, DpSparseFeaturesDist


def skip_distribution(model: nn.Module) -> None:
    """Takes collectives, bucketing and permuting out of sharded collections that one rank owns whole.

    Sharding types, parameters and checkpoints stay as they are; only the distributions are replaced, by
    those of data-parallel tables, which hand on what they get. Call before the first batch.
    Collections that remap ids first have their own way and are left alone.
    """
    for name, module in model.named_modules():
        if name.endswith("_embedding_module"):
            continue
        if isinstance(module, ShardedEmbeddingBagCollection):
            shardings = module._embedding_shardings
            output: type[nn.Module] = DpPooledEmbeddingDist
        elif isinstance(module, ShardedEmbeddingCollection):
            shardings = list(module._sharding_type_to_sharding.values())
            output = DpSequenceEmbeddingDist
        else:
            continue
        for sharding in shardings:
            sharding.create_input_dist = DpSparseFeaturesDist  # type: ignore[method-assign]
        module._output_dists = nn.ModuleList(output() for _ in module._output_dists)  # type: ignore[assignment]
