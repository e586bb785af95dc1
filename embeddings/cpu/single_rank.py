"""On a single rank nothing has to travel: ids and vectors go straight to and from the kernel."""

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import (
    EmbeddingShardingContext,
    KJTListSplitsAwaitable,
)
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingDist
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingDist, DpSparseFeaturesDist
from torchrec.distributed.types import Awaitable, LazyAwaitable, LazyNoWait, NoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


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
        if isinstance(module, ShardedEmbeddingBagCollection):
            _shorten(module)


def _shorten(module: ShardedEmbeddingBagCollection) -> None:
    """One kernel for all tables: ids go to it and vectors come from it without a detour.

    What the library does in between (splitting into one part, awaiting what is there, joining one part)
    costs about half a millisecond a step, whatever the sizes.
    """
    lookups = list(module._lookups)
    if len(lookups) != 1 or not isinstance(lookups[0], GroupedPooledEmbeddingsLookup):
        return
    if len(lookups[0]._emb_modules) != 1 or module._has_mean_pooling_callback:
        return
    kernel, compute = lookups[0]._emb_modules[0], module.compute_and_output_dist
    distribute = module.input_dist

    def input_dist(
        context: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        begun = not module._has_uninitialized_input_dist and not module._has_features_permute
        if not begun or features.variable_stride_per_key():
            return distribute(context, features)
        context.sharding_contexts.append(EmbeddingShardingContext())
        return KJTListSplitsAwaitable(
            [NoWait(NoWait(features))], context, module._module_fqn, module._sharding_types
        )

    def compute_and_output_dist(
        context: EmbeddingBagCollectionContext, features: KJTList
    ) -> LazyAwaitable[KeyedTensor]:
        if context.variable_batch_per_feature:
            return compute(context, features)
        names, dims = module._embedding_names, module._embedding_dims
        return LazyNoWait(KeyedTensor(names, dims, kernel(features[0])))

    module.input_dist = input_dist  # type: ignore[method-assign]
    module.compute_and_output_dist = compute_and_output_dist  # type: ignore[method-assign]
