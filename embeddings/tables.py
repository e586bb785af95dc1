"""Sharded tables: trainable ones for ids, frozen ones for knowledge vectors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


@dataclass(frozen=True)
class Table:
    """One table: `rows` x `dim`, read by the named features (columns of a KeyedJaggedTensor)."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    bytes_per_value: int = 4


def _initialiser(std: float) -> Callable[[Tensor], Tensor]:
    def fill(weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight.normal_(0.0, std)

    return fill


def pooled_collection(tables: list[Table], init_std: float) -> EmbeddingBagCollection:
    """Builds sum-pooled tables on the meta device (no memory until they are sharded)."""
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                pooling=PoolingType.SUM,
                init_fn=_initialiser(init_std),
            )
            for table in tables
        ],
    )


def sequence_collection(tables: list[Table], init_std: float) -> EmbeddingCollection:
    """Builds tables whose features keep one vector per id, on the meta device; one dim for all of them."""
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=table.name,
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                init_fn=_initialiser(init_std),
            )
            for table in tables
        ],
    )


class SparseFeatures(nn.Module):
    """The trainable tables of a model: pooled features and sequence features in one forward."""

    def __init__(self, pooled: list[Table], sequences: list[Table], init_std: float) -> None:
        super().__init__()
        self.pooled = pooled_collection(pooled, init_std)
        self.sequences = sequence_collection(sequences, init_std)

    def forward(self, ids: KeyedJaggedTensor) -> tuple[KeyedTensor, dict[str, JaggedTensor]]:
        """Looks up rows; both results are awaitables under sharding, so communication overlaps."""
        return self.pooled(ids), self.sequences(ids)


class FrozenTables(nn.Module):
    """Vectors that are looked up and never trained.

    A sharded table ignores `requires_grad_(False)`. What keeps it frozen is a collection of its own
    that is called under `no_grad`: no gradient is exchanged, no optimizer state exists, no row moves.
    Empty bags give zeros. Values are float16 in memory and float32 in the output.
    """

    def __init__(self, tables: list[Table]) -> None:
        super().__init__()
        self.tables = tables
        self.collection = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=table.name,
                    num_embeddings=table.rows,
                    embedding_dim=table.dim,
                    feature_names=list(table.features),
                    pooling=PoolingType.SUM,
                    data_type=DataType.FP16,
                    init_fn=_zeros,
                )
                for table in tables
            ],
        )

    def forward(self, rows: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up vectors by row."""
        with torch.no_grad():
            return self.collection(rows)


def _zeros(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.zero_()


def load_frozen_rows(
    collection: nn.Module,
    readers: Mapping[str, Callable[[int, int], np.ndarray]],
    chunk: int = 65_536,
) -> None:
    """Fills the local shards of sharded frozen tables; each rank reads only the rows that it owns.

    Args:
        collection: The sharded `FrozenTables.collection`.
        readers: Table name to `read(start, stop)`, which returns vectors [stop - start, dim].
        chunk: Rows per read; bounds the memory in flight.

    Raises:
        ValueError: If a reader returns another shape than the shard needs.
    """
    state = collection.state_dict()
    for name, read in readers.items():
        sharded = state[f"embedding_bags.{name}.weight"]
        for shard in sharded.local_shards():
            row, column = shard.metadata.shard_offsets
            count, width = shard.metadata.shard_sizes
            for start in range(0, count, chunk):
                stop = min(start + chunk, count)
                vectors = read(row + start, row + stop)[:, column : column + width]
                if vectors.shape != (stop - start, width):
                    raise ValueError(
                        f"table {name}: rows {row + start}..{row + stop} came as {vectors.shape}"
                    )
                # The shard aliases the kernel's own storage: an in-place copy is all it takes.
                shard.tensor[start:stop].copy_(torch.from_numpy(np.ascontiguousarray(vectors)))
