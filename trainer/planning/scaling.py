"""What a model of any size takes on a cluster of any size, by formulas: nothing here is measured.

Memory and traffic are those of `embeddings/planning`, which `llm4msr plan`
uses as well; here they become seconds, checkpoints and hours of a language model.
docs/results/scaling.md is made of them; `tests/trainer/planning/test_scaling.py` compares them with
counts on two ranks.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embeddings.placement import Placement
from embeddings.planning.capacity import greedy_placement
from embeddings.planning.memory import Memory, moved_bytes, plan_memory
from embeddings.planning.traffic import Traffic, all_reduce, by_link, plan_traffic
from embeddings.sharding import Hardware, TablePlan
from embeddings.tables import Table
from trainer.config.model import MetaConfig, ModelConfig
from trainer.config.tables import HardwareConfig
from trainer.data.loading.batch import Batch
from trainer.models.llm4msr import LLM4MSR
from trainer.models.shapes import Shapes
from trainer.planning.plan import DENSE_BYTES
from trainer.run.hardware import Cluster, absent_cluster

DENSE_SAVED_BYTES = 12  # per parameter in a checkpoint: weight and two moments of Adam
FLOPS_SAMPLES = 8


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder-only language model; the default is that of Qwen3-8B."""

    layers: int = 36
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    key_value_heads: int = 8
    head_dim: int = 128

    @property
    def weights(self) -> int:
        """Parameters that every token is multiplied with: all but embeddings and norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


@dataclass(frozen=True)
class Description:
    """What is to be trained, and what the cluster is assumed to be able to do.

    Attributes:
        users: Rows of the user table and of the users' knowledge.
        items: Rows of the item table and of the items' knowledge.
        scenarios: Number of scenarios.
        dim: Width of the id tables, float32.
        history: Items in a sample's history.
        knowledge_dim: Width of knowledge vectors, float16.
        batch: Samples per GPU.
        optimizer: Of the id tables.
        gpus_per_host: GPUs of a host.
        training_flops: FLOP/s of a GPU, dense TF32, by the data sheet of an H100 SXM.
        training_utilisation: Share of it that the dense part reaches, assumed.
        storage_host: Bytes per second that a host writes to shared storage, assumed.
        storage_total: Bytes per second that the storage takes from all hosts, assumed.
        user_tokens: Tokens of a user's prompt.
        item_tokens: Tokens of an item's prompt, assumed.
        shared_tokens: Of either, those that all prompts begin with: computed once.
        extraction_flops: FLOP/s of a GPU, dense bfloat16, by the data sheet of an H100 SXM.
        extraction_utilisation: Share of it that extraction reaches, assumed.
    """

    users: int = 10**9
    items: int = 10**9
    scenarios: int = 8
    dim: int = 64
    history: int = 20
    knowledge_dim: int = 128
    batch: int = 4096
    optimizer: str = "rowwise_adagrad"
    gpus_per_host: int = 8
    training_flops: float = 495e12
    training_utilisation: float = 0.2
    storage_host: float = 5e9
    storage_total: float = 100e9
    user_tokens: int = 342
    item_tokens: int = 120
    shared_tokens: int = 87
    extraction_flops: float = 989e12
    extraction_utilisation: float = 0.4

    def hardware(self, gpus: int) -> Hardware:
        """The cluster; bandwidths are the configuration's defaults: an H100 host's data sheet."""
        cluster = Cluster(gpus // self.gpus_per_host, self.gpus_per_host, "cuda")
        return absent_cluster(HardwareConfig(), cluster)

    def model(self) -> LLM4MSR:
        """The model, its tables without memory: STAR with meta layers on both levels, item match."""
        shapes = Shapes(
            self.users,
            self.items,
            self.history,
            self.scenarios,
            (self.users, self.knowledge_dim),
            (self.items, self.knowledge_dim),
            torch.zeros(self.scenarios, self.knowledge_dim),
        )
        meta = MetaConfig(enabled=True, item_knowledge="match")
        return LLM4MSR(ModelConfig(hidden=[1024, 512, 256], meta=meta), shapes, self.dim, 0.01)


@dataclass(frozen=True)
class Layout:
    """One placement of the tables on one cluster.

    Attributes:
        gpus: Ranks.
        pooled: Sharding of the tables that give one vector per sample; the item table is row-wise.
        memory: Of the tables, bytes per rank.
        dense_memory: Of the dense part, bytes per rank.
        traffic: Of the tables, bytes per step between ranks.
        dense_traffic: Of the dense part's gradients.
        per_sample: Bytes per sample (within hosts, between hosts), the dense part's included.
        seconds: Least seconds per step of the worst rank, by resource.
        saved: Bytes of tables and their state in a checkpoint, per rank.
        saved_dense: Bytes of the dense part in a checkpoint, once.
    """

    gpus: int
    pooled: str
    memory: Memory
    dense_memory: int
    traffic: Traffic
    dense_traffic: np.ndarray
    per_sample: tuple[float, float]
    seconds: dict[str, float]
    saved: np.ndarray
    saved_dense: int

    @property
    def bound(self) -> str:
        """The resource that a step waits for if all others hide behind it."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def dense_parameters(model: LLM4MSR) -> int:
    """Parameters outside of tables."""
    return sum(parameter.numel() for parameter in model.dense.parameters())


def _grouped_flops(h: list[int], weight: list[int], *_: object, **__: object) -> int:
    return 2 * h[0] * weight[1] * weight[2]


def _meta_flops(h: list[int], g: list[int], weight: list[int], *_: object, **__: object) -> int:
    return 2 * h[0] * math.prod(weight)


# What torch's counter does not know: this project's own operators; shapes in, FLOPs out.
OWN_FLOPS = {
    torch.ops.llm4msr.grouped_linear: _grouped_flops,
    torch.ops.llm4msr.grouped_linear_backward: lambda dy, y, *rest, **_: 2 * _grouped_flops(*rest),
    torch.ops.llm4msr.meta_linear: _meta_flops,
    torch.ops.llm4msr.meta_linear_backward: lambda dy, y, *rest, **_: 2 * _meta_flops(*rest),
}


def flops_per_sample(model: LLM4MSR, description: Description) -> float:
    """FLOPs of the dense part per sample, forward and backward: counted while it runs on random input.

    What does not grow with the batch, as layers that are generated once per scenario, is left out.
    """

    def counted(samples: int) -> int:
        def values(rows: int, width: int) -> torch.Tensor:
            return torch.rand(rows, width, requires_grad=True)

        def ids(**features: int) -> KeyedJaggedTensor:
            lengths = torch.tensor(list(features.values())).repeat_interleave(samples)
            return KeyedJaggedTensor(
                list(features), torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths=lengths
            )

        dim, history = description.dim, description.history
        single, many = torch.ones(samples, dtype=torch.int64), torch.full((samples,), history)
        scenario = torch.arange(samples) % description.scenarios
        label = torch.ones(samples)
        batch = Batch(
            ids(user=1, item=1, history=history),
            ids(user=1, item=1),
            scenario,
            scenario,
            label,
            label,
        )
        sequences = {
            "item": JaggedTensor(values(samples, dim), lengths=single),
            "history": JaggedTensor(values(samples * history, dim), lengths=many),
        }
        width = description.knowledge_dim
        vectors = {level: torch.rand(samples, width) for level in ("user", "item")}
        with FlopCounterMode(display=False, custom_mapping=OWN_FLOPS) as counter:
            loss, _ = model.dense({"user": values(samples, dim)}, sequences, vectors, batch)
            loss.backward()
        return counter.get_total_flops()

    return (counted(2 * FLOPS_SAMPLES) - counted(FLOPS_SAMPLES)) / FLOPS_SAMPLES


def worst_link(matrix: np.ndarray, hosts: int) -> tuple[float, float]:
    """Bytes that the busiest rank sends or receives (within its host, between hosts)."""
    host = np.arange(len(matrix)) // (len(matrix) // hosts)
    inside = matrix * (host[:, None] == host[None, :])
    parts = inside, matrix - inside
    first, second = (float(max(part.sum(0).max(), part.sum(1).max())) for part in parts)
    return first, second


def saved_bytes(
    tables: list[Table], plans: list[TablePlan], optimizer: str, ranks: int
) -> np.ndarray:
    """Bytes of trained rows and their optimizer's state, per rank: a checkpoint's, but the dense part's."""
    held = plan_memory(tables, plans, {}, optimizer, 0, ranks)
    return held.tables + held.optimizer


def lay_out(description: Description, model: LLM4MSR, gpus: int, pooled: str) -> Layout:
    """Places the tables and adds everything up, but for FLOPs (`seconds` lacks "compute")."""
    hardware, tables = description.hardware(gpus), model.tables
    by_table = {entry.name: Placement("row_wise" if entry.sequence else pooled) for entry in tables}
    plans = greedy_placement(tables, by_table, hardware, "row_wise")
    batch, optimizer = description.batch, description.optimizer
    traffic = plan_traffic(tables, plans, batch, gpus, hardware.hosts)
    parameters = dense_parameters(model)
    dense_traffic = all_reduce(4 * parameters, gpus)
    matrix = traffic.total + dense_traffic
    inside, between = by_link(matrix, hardware.hosts)
    worst_inside, worst_between = worst_link(matrix, hardware.hosts)
    known = {table.name: table for table in tables}
    moved = sum(moved_bytes(known[plan.table], plan, optimizer, batch) for plan in plans)
    return Layout(
        gpus,
        pooled,
        plan_memory(tables, plans, by_table, optimizer, batch, gpus),
        parameters * DENSE_BYTES,
        traffic,
        dense_traffic,
        (inside / gpus / batch, between / gpus / batch),
        {
            "memory": float(np.max(moved)) / hardware.device_bandwidth,
            "link in host": worst_inside / hardware.intra_host,
            "link between hosts": worst_between / hardware.inter_host,
        },
        saved_bytes(tables, plans, optimizer, gpus),
        parameters * DENSE_SAVED_BYTES,
    )


def checkpoint_seconds(layout: Layout, description: Description) -> float:
    """Seconds to write a checkpoint: the fullest host's share, or the storage's all of it."""
    of_host = layout.saved.reshape(-1, description.gpus_per_host).sum(1)
    of_host[0] += layout.saved_dense
    return max(
        float(of_host.max()) / description.storage_host,
        float(of_host.sum()) / description.storage_total,
    )


def extraction_flops(decoder: Decoder, tokens: int, shared: int) -> int:
    """FLOPs of one prompt whose first `shared` tokens were computed before, without logits.

    `2 * weights` per new token, and in each layer every new token against every token, for scores and
    for sums: `4 * heads * head_dim`. Attention that leaves out what the causal mask hides does less.
    """
    new = tokens - shared
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim * new * tokens
    return 2 * decoder.weights * new + attention


def extraction_hours(description: Description, rows: int, tokens: int, gpus: int) -> float:
    """Hours of all GPUs together for `rows` prompts."""
    work = rows * extraction_flops(Decoder(), tokens, description.shared_tokens)
    rate = description.extraction_flops * description.extraction_utilisation * gpus
    return work / rate / 3600
