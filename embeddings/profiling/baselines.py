"""What a sharded lookup is held against: plain torch, the bare kernel, and the arithmetic itself."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.profiling.measure import Clock
from embeddings.profiling.phases import Subject, Timing, backward, outputs
from embeddings.tables import Table

EPSILON = 1e-8  # the fused kernels' own
RULES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class PlainTables:
    """`nn.EmbeddingBag` (or `nn.Embedding`) with sparse gradients, one module per table.

    Torch has no row-wise Adagrad for sparse gradients: its Adagrad stands in, and `rule` says so.
    """

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self._tables, self._sequence = subject.tables, subject.sequence
        trained = subject.rule is not None
        kind: Any = nn.Embedding if self._sequence else nn.EmbeddingBag
        options = {} if self._sequence else {"mode": "sum"}
        self._modules = [
            kind(table.rows, table.dim, sparse=trained, device=device, **options)
            for table in subject.tables
        ]
        weights = [module.weight.requires_grad_(trained) for module in self._modules]
        self.rule = "sgd" if subject.rule == "sgd" else "adagrad" if trained else None
        self._optimizer: torch.optim.Optimizer | None = None
        if self.rule == "sgd":
            self._optimizer = torch.optim.SGD(weights, lr=subject.learning_rate)
        elif self.rule == "adagrad":
            self._optimizer = torch.optim.Adagrad(weights, lr=subject.learning_rate, eps=EPSILON)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Looks up a batch."""
        looked_up = {}
        for table, module in zip(self._tables, self._modules, strict=True):
            for feature in table.features:
                part = ids[feature]
                if self._sequence:
                    looked_up[feature] = module(part.values())
                else:
                    looked_up[feature] = module(part.values(), part.offsets()[:-1])
        return looked_up if self._sequence else {"": torch.cat(list(looked_up.values()), dim=1)}

    def step(
        self, ids: KeyedJaggedTensor, gradient: dict[str, Tensor], clock: Clock
    ) -> dict[str, Timing]:
        """Times "forward" and "step"."""
        began = clock.start()
        values = self.forward(ids)
        forward = clock.stop(began)
        if self._optimizer is not None:
            backward(values, gradient)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return {"forward": forward, "step": clock.stop(began)}


class BareKernel:
    """FBGEMM's batched tables with the fused rule, fed ids and lengths as the sharded collection is."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        tables, cuda = subject.tables, device.type == "cuda"
        self.rule, self._sequence = subject.rule, subject.sequence
        self._features = [feature for table in tables for feature in table.features]
        self._kernel = SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[
                (
                    table.rows,
                    table.dim,
                    EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST,
                    ComputeDevice.CUDA if cuda else ComputeDevice.CPU,
                )
                for table in tables
            ],
            feature_table_map=[
                number for number, table in enumerate(tables) for _ in table.features
            ],
            optimizer=RULES[subject.rule or "sgd"],
            learning_rate=subject.learning_rate,
            pooling_mode=PoolingMode.NONE if self._sequence else PoolingMode.SUM,
            device=device,
        )
        with torch.no_grad():
            for weight in self._kernel.split_embedding_weights():
                weight.normal_(0.0, 0.1)

    def step(
        self, ids: KeyedJaggedTensor, gradient: dict[str, Tensor], clock: Clock
    ) -> dict[str, Timing]:
        """Times "forward" and "step"; choosing features out of `ids` is not part of it."""
        if ids.keys() != self._features:
            ids = ids.permute([ids.keys().index(name) for name in self._features])
        values, lengths = ids.values(), ids.lengths()
        joined = (
            torch.cat([gradient[name] for name in gradient]) if self._sequence else gradient[""]
        )
        began = clock.start()
        with torch.set_grad_enabled(self.rule is not None):
            output = self._kernel(values, torch.ops.fbgemm.asynchronous_complete_cumsum(lengths))
        forward = clock.stop(began)
        if self.rule is not None:
            output.backward(joined)
        return {"forward": forward, "step": clock.stop(began)}


class Reference:
    """The whole tables and their optimizer state on every rank, updated by the rules as they are written.

    A fused kernel averages gradients over ranks; RowWiseAdagrad keeps one sum per row and column shard.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._pieces = _column_pieces(subject)
        self.weights = whole_weights(subject)
        self._state = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def forward(self, ids: KeyedJaggedTensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs by feature, and the leaves that gradients arrive at."""
        leaves = {
            name: weight.detach().clone().requires_grad_() for name, weight in self.weights.items()
        }
        looked_up = {}
        for table in self._subject.tables:
            for feature in table.features:
                part, leaf = ids[feature], leaves[table.name]
                if self._subject.sequence:
                    looked_up[feature] = nn.functional.embedding(part.values(), leaf)
                else:
                    looked_up[feature] = nn.functional.embedding_bag(
                        part.values(), leaf, part.offsets()[:-1], mode="sum"
                    )
        if not self._subject.sequence:
            looked_up = {"": torch.cat([looked_up[f] for f in _output_order(self._subject)], dim=1)}
        return looked_up, leaves

    def update(self, leaves: dict[str, Tensor]) -> None:
        """Applies the rule to the gradients' mean over ranks."""
        for name, leaf in leaves.items():
            gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
            weight, state = self.weights[name], self._state[name]
            if self._subject.rule == "sgd":
                weight -= self._subject.learning_rate * gradient
                continue
            squares = gradient.square()
            if self._subject.rule == "rowwise_adagrad":
                for low, high in self._pieces[name]:
                    squares[:, low:high] = squares[:, low:high].mean(1, keepdim=True)
            state += squares
            weight -= self._subject.learning_rate * gradient / (state.sqrt() + EPSILON)


def check(subject: Subject, reference: Reference, steps: int = 2) -> list[str]:
    """Compares outputs and updated rows with the reference; the collection must not have trained yet.

    Returns:
        What differs on this rank; empty when all is equal within float32's rounding.
    """
    wrong = []
    for step in range(steps):
        ids, gradient = subject.fresh(step), subject.gradient(step)
        with subject.context():
            outputs_of_table = outputs(subject.module(subject.fresh(step)).wait())
        expected, leaves = reference.forward(ids)
        for name, value in outputs_of_table.items():
            wrong += _difference(
                f"step {step}: output {name or 'of all features'}", value, expected[name]
            )
        if subject.rule is not None:
            backward(outputs_of_table, gradient)
            subject.update()
            backward({name: expected[name] for name in outputs_of_table}, gradient)
            reference.update(leaves)
        for name, weight in whole_weights(subject).items():
            wrong += _difference(
                f"step {step}: rows of table {name}", weight, reference.weights[name]
            )
    return wrong


def _difference(what: str, measured: Tensor, expected: Tensor) -> list[str]:
    if measured.shape != expected.shape:
        return [f"{what}: shape {tuple(measured.shape)}, expected {tuple(expected.shape)}"]
    close = torch.isclose(measured, expected, rtol=1e-4, atol=1e-5)
    if bool(close.all()):
        return []
    largest = (measured - expected).abs().max().item()
    return [
        f"{what}: {int((~close).sum()):,} of {close.numel():,} values differ, by up to {largest:.3g}"
    ]


def _output_order(subject: Subject) -> list[str]:
    """Features in the order of a pooled output's columns."""
    return list(subject.module._embedding_names)


def _weight_of(subject: Subject, table: Table) -> Any:
    inner = "embeddings" if subject.sequence else "embedding_bags"
    return subject.module.state_dict()[f"{inner}.{table.name}.weight"]


def _column_pieces(subject: Subject) -> dict[str, list[tuple[int, int]]]:
    """The column ranges of each table's shards."""
    by_table = {}
    for table in subject.tables:
        weight = _weight_of(subject, table)
        pieces = {(0, table.dim)}
        if isinstance(weight, ShardedTensor):
            shards: Iterable[Any] = weight.metadata().shards_metadata
            pieces = {(s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]) for s in shards}
        by_table[table.name] = sorted(pieces)
    return by_table


def whole_weights(subject: Subject) -> dict[str, Tensor]:
    """Gathers every table on every rank, float32 [rows, dim]."""
    pieces_here: dict[str, list[tuple[list[int], Tensor]]] = {}
    for table in subject.tables:
        weight = _weight_of(subject, table)
        if isinstance(weight, ShardedTensor):
            pieces_here[table.name] = [
                (list(shard.metadata.shard_offsets), shard.tensor.detach().float().cpu())
                for shard in weight.local_shards()
            ]
        else:
            pieces_here[table.name] = [([0, 0], weight.detach().float().cpu())]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, pieces_here)
    device = subject.batches[0].device()
    whole = {}
    for table in subject.tables:
        full = torch.full((table.rows, table.dim), float("nan"))
        for parts in everywhere:
            for (row, column), piece in parts[table.name]:
                full[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
        whole[table.name] = full.to(device)
    return whole
