"""Sharded tables: trainable ones for ids, frozen ones for knowledge vectors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

# Bags are sum-pooled, which is torchrec's default.
_Config = TypeVar("_Config", EmbeddingBagConfig, EmbeddingConfig)


@dataclass(frozen=True)
class Table:
    """One table: `rows` x `dim`, read by the named features (columns of a KeyedJaggedTensor).

    Attributes:
        name: Its name.
        rows: Number of rows.
        dim: Width of a row.
        features: Names of the features that read it.
        bytes_per_value: 4 for float32, 2 for float16.
        sequence: Whether it gives one vector per id; otherwise the sum over a sample's ids.
        ids_per_sample: Mean number of ids of each feature: what plans are made with. Empty: 1 each.
        frozen: Whether it is only looked up.
        weighted: Whether its ids have weights, and it gives the weighted sum.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    bytes_per_value: int = 4
    sequence: bool = False
    ids_per_sample: tuple[float, ...] = ()
    frozen: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class HashZch:
    """How ids get rows in torchrec's hash-based tables, see `embeddings.experimental.hash_zch`.

    Attributes:
        buckets: Parts of a table that move whole between ranks: a multiple of every number of ranks.
        hours: How long, by the clock, an unseen id keeps its row; None for ever: a full table then takes
            no new id.
    """

    buckets: int
    hours: int | None = None


def _initialiser(std: float) -> Callable[[Tensor], Tensor]:
    def fill(weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight.normal_(0.0, std)

    return fill


def _configs(
    kind: type[_Config],
    tables: list[Table],
    init_fn: Callable[[Tensor], Tensor] | None = None,
    data_type: DataType | None = None,
) -> list[_Config]:
    """Tables in torchrec's words; without `data_type`, values are as wide as each table says."""
    types = {2: DataType.FP16, 4: DataType.FP32}
    return [
        kind(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=list(table.features),
            data_type=data_type or types[table.bytes_per_value],
            init_fn=init_fn,
        )
        for table in tables
    ]


def pooled_collection(
    tables: list[Table], init_std: float, is_weighted: bool = False
) -> EmbeddingBagCollection:
    """Builds sum-pooled tables on the meta device (no memory until they are sharded).

    `is_weighted` is never left to the library: unsharded, its default ignores weights, sharded it does not.
    """
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=_configs(EmbeddingBagConfig, tables, _initialiser(init_std), DataType.FP32),
        is_weighted=is_weighted,
    )


def sequence_collection(tables: list[Table], init_std: float) -> EmbeddingCollection:
    """Builds tables whose features keep one vector per id, on the meta device; one dim for all of them."""
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=_configs(EmbeddingConfig, tables, _initialiser(init_std), DataType.FP32),
    )


def collections(tables: list[Table]) -> nn.Module:
    """Collections of any tables on the meta device, grouped as torchrec needs them: only to plan with."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        kind = f"sequences_{table.dim}" if table.sequence else "pooled"
        kind = "weighted" if table.weighted else kind
        groups.setdefault(f"frozen_{kind}" if table.frozen else kind, []).append(table)
    meta = torch.device("meta")
    return nn.ModuleDict(
        {
            name: EmbeddingCollection(device=meta, tables=_configs(EmbeddingConfig, group))
            if group[0].sequence
            else EmbeddingBagCollection(
                device=meta,
                tables=_configs(EmbeddingBagConfig, group),
                is_weighted=group[0].weighted,
            )
            for name, group in groups.items()
        }
    )


class SparseFeatures(nn.Module):
    """The trainable tables of a model: pooled features and sequence features in one forward.

    Pooled tables of all widths are one collection, whose exchanges do not grow with their number; those
    whose ids have weights are a second one. Sequences are one collection per width, as torchrec has it:
    `sequences` of the first table's, `further_sequences` of the others.

    Args:
        pooled: Tables whose features are summed up.
        sequences: Tables whose features keep one vector per id.
        init_std: Deviation of the first vectors.
        hash_zch: Rows are given to ids by torchrec's kernel; None: ids are rows.
        weighted: Tables whose features are summed up by their weights.
    """

    def __init__(
        self,
        pooled: list[Table],
        sequences: list[Table],
        init_std: float,
        hash_zch: HashZch | None = None,
        weighted: list[Table] | None = None,
    ) -> None:
        super().__init__()
        self.weighted = (
            pooled_collection(weighted, init_std, is_weighted=True) if weighted else None
        )
        self.pooled: nn.Module = pooled_collection(pooled, init_std)
        by_width: dict[int, list[Table]] = {table.dim: [] for table in sequences}
        for table in sequences:
            by_width[table.dim].append(table)
        first, *others = by_width.values() or [[]]
        self.sequences: nn.Module = sequence_collection(first, init_std)
        self.further_sequences = nn.ModuleDict(
            {f"width_{group[0].dim}": sequence_collection(group, init_std) for group in others}
        )
        self.hash_zch = hash_zch
        if hash_zch is not None:
            # Only here and in `sharding.sharders`: nothing else needs what has never run on its hardware.
            from embeddings.experimental.hash_zch import with_hash_zch

            self.pooled = with_hash_zch(self.pooled, hash_zch.buckets, hash_zch.hours)
            self.sequences = with_hash_zch(self.sequences, hash_zch.buckets, hash_zch.hours)

    @property
    def sequence_collections(self) -> list[nn.Module]:
        """All collections of sequences."""
        return [self.sequences, *self.further_sequences.values()]

    def forward(self, ids: KeyedJaggedTensor) -> tuple[KeyedTensor, dict[str, JaggedTensor]]:
        """Looks up rows; both results are awaitables under sharding, so communication overlaps."""
        pooled, sequences = self.pooled(ids), self.sequences(ids)
        return (pooled[0], sequences[0]) if self.hash_zch else (pooled, sequences)

    def look_up_further(self, ids: KeyedJaggedTensor) -> list[dict[str, JaggedTensor]]:
        """Looks up the sequences of other widths, one result per collection."""
        return [collection(ids) for collection in self.further_sequences.values()]

    def look_up_weighted(self, ids: KeyedJaggedTensor) -> KeyedTensor | None:
        """Looks up the tables whose ids have weights; None without such tables."""
        return self.weighted(ids) if self.weighted is not None else None


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
            tables=_configs(EmbeddingBagConfig, tables, _zeros, DataType.FP16),
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
        for piece, (row, column) in local_pieces(state[f"embedding_bags.{name}.weight"]):
            count, width = piece.shape
            for start in range(0, count, chunk):
                stop = min(start + chunk, count)
                vectors = read(row + start, row + stop)[:, column : column + width]
                if vectors.shape != (stop - start, width):
                    raise ValueError(
                        f"table {name}: rows {row + start}..{row + stop} came as {vectors.shape}"
                    )
                # The shard aliases the kernel's own storage: an in-place copy is all it takes.
                piece[start:stop].copy_(torch.from_numpy(np.ascontiguousarray(vectors)))


def local_pieces(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """This rank's parts of a table or of its state, each with its first row (and column).

    Data-parallel ones are whole.
    """
    if isinstance(weight, ShardedTensor):
        return [
            (shard.tensor.detach(), tuple(shard.metadata.shard_offsets))
            for shard in weight.local_shards()
        ]
    if isinstance(weight, DTensor):  # of groups with copies
        local = weight.to_local()
        shards, offsets = local.local_shards(), local.local_offsets()  # type: ignore[attr-defined]
        return [
            (shard.detach(), tuple(offset)) for shard, offset in zip(shards, offsets, strict=True)
        ]
    return [(weight.detach(), (0, 0))]
