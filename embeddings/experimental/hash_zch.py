"""torchrec's hash-based zero-collision tables (MPZCH), whose kernel inserts on CUDA only. Not measured.

Written from the source of torchrec 1.8. It differs from `zero_collision.remap`: the table of ids lies on the
GPU and is searched there, in the forward of its batch; an id probes 128 rows from its hash on and takes
the one that was not used for longest; unknown ids share the row that their hash points to; evictions
depend on the number of ranks. Only row-wise tables.
"""

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.mc_modules import ManagedCollisionCollectionSharder
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.hash_mc_evictions import HashZchEvictionConfig, HashZchEvictionPolicyName
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection


def with_hash_zch(
    collection: EmbeddingBagCollection | EmbeddingCollection, buckets: int, hours: int | None
) -> nn.Module:
    """Puts the remapping in front of every table of an unsharded collection.

    Its forward takes int64 ids, not negative, and returns (result of the collection, None).

    Args:
        collection: On the meta device; row counts are multiples of `buckets`.
        buckets: As in `embeddings.tables.HashZch`, like `hours`; the same for all tables.
        hours: See there.
    """
    pooled = isinstance(collection, EmbeddingBagCollection)
    configs = (
        collection.embedding_bag_configs()
        if isinstance(collection, EmbeddingBagCollection)
        else collection.embedding_configs()
    )
    modules = {
        config.name: HashZchManagedCollisionModule(
            zch_size=config.num_embeddings,
            device=torch.device("cpu"),  # made anew on the device when it is sharded
            total_num_buckets=buckets,
            eviction_policy_name=None if hours is None else HashZchEvictionPolicyName.LRU_EVICTION,
            eviction_config=None
            if hours is None
            else HashZchEvictionConfig(features=list(config.feature_names), single_ttl=hours),
        )
        for config in configs
    }
    remapping = ManagedCollisionCollection(modules, configs)  # type: ignore[arg-type]
    kind = ManagedCollisionEmbeddingBagCollection if pooled else ManagedCollisionEmbeddingCollection
    return kind(collection, remapping, allow_in_place_embed_weight_update=True)  # type: ignore[arg-type]


def hash_zch_sharders(
    pooled: EmbeddingBagCollectionSharder, sequences: EmbeddingCollectionSharder
) -> list[ModuleSharder[nn.Module]]:
    """Returns the sharders of what `with_hash_zch` makes, on top of those of the collections."""
    remapping = ManagedCollisionCollectionSharder()
    return [
        ManagedCollisionEmbeddingBagCollectionSharder(pooled, remapping),  # type: ignore[list-item]
        ManagedCollisionEmbeddingCollectionSharder(sequences, remapping),  # type: ignore[list-item]
    ]
