"""The model: sharded ids and frozen knowledge in, a backbone with meta layers around it, logits out."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from embeddings.tables import FrozenTables, HashZch, SparseFeatures, Table
from embeddings.zero_collision.remap import ZeroCollisionTables
from trainer.config.levels import ITEM, USER
from trainer.config.model import MetaConfig, ModelConfig
from trainer.data.loading.batch import Batch
from trainer.features.block import BLOCK, FeatureBlocks, FeatureShape, block_width
from trainer.features.pooling import SequenceShape
from trainer.models import BACKBONES
from trainer.models.layers import BottomWidth
from trainer.models.meta import (
    Generator,
    KnowledgeAdapter,
    KnowledgeMatch,
    ScenarioMetaLayers,
    UserMetaLayers,
    alignment_loss,
    project,
)
from trainer.models.shapes import Predictions, Shapes
from trainer.ops import take_rows


class MetaNetworks(nn.Module):
    """Everything that LLM4MSR adds to a backbone; all of its parameters train at their own step size."""

    def __init__(self, config: MetaConfig, shapes: Shapes, width: int, dim: int) -> None:
        super().__init__()
        user_dim = shapes.user_vectors[1] if shapes.user_vectors else 0
        item_dim = shapes.item_vectors[1] if shapes.item_vectors else 0
        generator = Generator(
            config.rank,
            config.kind,
            config.core_width,
            config.form == "residual",
            config.strategy,
        )
        hidden = config.adapter_hidden
        self.scenario_vectors: Tensor
        self.scenario_stores: Tensor
        self.user_adapter = self.user_layers = self.scenario_adapter = self.scenario_layers = None
        self.match, dim_s = None, 0
        self.alignment = config.alignment
        if config.reads("user"):
            self.user_adapter = KnowledgeAdapter(
                user_dim, config.rank, config.noise, config.dropout, hidden
            )
        if config.user_layers:
            self.user_layers = UserMetaLayers(width, config.user_layers, generator)
        if shapes.scenario_vectors is not None:
            # Few and small: every rank keeps all of them. Not in checkpoints, the store has them.
            self.register_buffer("scenario_vectors", shapes.scenario_vectors, persistent=False)
            self.register_buffer("scenario_stores", shapes.scenario_stores, persistent=False)
            dim_s = shapes.scenario_vectors.shape[1]
        if config.reads("scenario"):
            # A scenario's vector never stands for a user: neither noise nor dropout is called for.
            self.scenario_adapter = KnowledgeAdapter(dim_s, config.rank, 0.0, 0.0, hidden)
        if config.scenario_layers:
            self.scenario_layers = ScenarioMetaLayers(
                width,
                config.scenario_width,
                config.scenario_layers,
                generator,
                shapes.tasks,
                config.fusion,
            )
        given = [*config.inputs, *(["item"] if config.item_knowledge != "none" else [])]
        dims = {"user": user_dim, "scenario": dim_s, "item": item_dim}
        self.inputs = nn.ModuleDict(
            {level: nn.Linear(dims[level], dim, bias=False) for level in given}
        )
        for weight in self.inputs.parameters():
            nn.init.zeros_(weight)
        if config.item_knowledge == "match":
            self.match = KnowledgeMatch(
                user_dim,
                item_dim,
                config.match_width,
                shapes.tasks,
                tuple(config.match_layers),
                generator,
                config.match_dropout,
            )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their step size: "knowledge" of what reads vectors as such, "meta" of the rest."""
        readers = [self.inputs, *([self.match] if self.match is not None else [])]
        reading = {id(parameter) for module in readers for parameter in module.parameters()}
        groups: dict[str, list[nn.Parameter]] = {"meta": [], "knowledge": []}
        for parameter in self.parameters():
            groups["knowledge" if id(parameter) in reading else "meta"].append(parameter)
        return groups

    def strategies(self, rows: int, device: str) -> list[str]:
        """One line per meta layer: which implementation a batch of `rows` will take, and why."""
        layers: list[tuple[nn.Module, int | None]] = []
        if self.user_layers is not None:
            layers += [(layer, None) for layer in self.user_layers.layers]
        shared = len(self.scenario_vectors) + 1 if self.scenario_adapter is not None else None
        if self.scenario_layers is not None:
            layers += [(layer, shared) for layer in self.scenario_layers.layers]
        if self.match is not None:
            layers += [
                (layer, shared if level == "scenario" else None)
                for level, layer in self.match.meta.items()
            ]
        return [layer.explain(rows, keys, device) for layer, keys in layers]  # type: ignore[operator]

    def read(self, knowledge: KeyedTensor | dict) -> dict[str, dict[str, Tensor]]:
        """The first projections of user and item vectors [B, dim]: one product per level.

        Returns:
            Level to reader ("input", "code", "match") to [B, width of it]; what is not configured is not
            there.
        """
        readers: dict[str, dict[str, nn.Linear]] = {"user": {}, "item": {}}
        for level, projections in readers.items():
            if level in self.inputs:
                projections["input"] = self.inputs[level]  # type: ignore[assignment]
            if self.match is not None:
                projections["match"] = getattr(self.match, level)
        if self.user_adapter is not None:
            readers["user"]["code"] = self.user_adapter.first
        return {
            level: dict(
                zip(projections, project(knowledge[level], list(projections.values())), strict=True)
            )
            for level, projections in readers.items()
            if projections
        }

    def scenario_as_input(self, rows: Tensor) -> Tensor | float:
        """The same for scenarios, by row of the store int64 [B] (-1 = none)."""
        if "scenario" not in self.inputs:
            return 0.0
        added = self.inputs["scenario"](self.scenario_vectors)
        return take_rows(F.pad(added, (0, 0, 0, 1)), rows % (len(added) + 1))

    def codes(
        self, projection: Tensor | None, known: Tensor, rows: Tensor
    ) -> tuple[dict[str, tuple[Tensor, Tensor | None]], Tensor]:
        """The small codes that generators read, per level that is configured.

        Args:
            projection: Of the user vectors for the adapter [B, width], None without one.
            known: Samples that have one, bool [B].
            rows: Row of each sample's scenario in the scenario store, -1 without one, int64 [B].

        Returns:
            The codes: "user": z_u [B, rank] and None; "scenario": z_s [S + 1, rank] and the row of each
            sample. And which samples' z_u reads the user's vector, not the default, bool [B].
        """
        codes: dict[str, tuple[Tensor, Tensor | None]] = {}
        if self.user_adapter is not None:
            assert projection is not None
            z, known = self.user_adapter(projection, known)
            codes["user"] = z, None
        if self.scenario_adapter is not None:
            z = self.scenario_adapter.all_codes(self.scenario_vectors)
            codes["scenario"] = z, rows % len(z)  # -1 is the last one: "no knowledge"
        return codes, known

    def align(
        self, codes: dict[str, tuple[Tensor, Tensor | None]], batch: Batch, read: Tensor
    ) -> Tensor:
        """Weighted loss that aligns the levels, over positives that have knowledge on both.

        Not where z_u is the default, for want of a vector or by dropout (`read` bool [B] is false): it
        stands for all users, and begins at 0, where a direction has no gradient.
        """
        z, rows = codes["scenario"]
        assert rows is not None
        none = len(z) - 1
        weight = batch.weight * batch.label * read * (rows < none)
        rows = rows.clamp(max=none - 1)
        loss = alignment_loss(codes["user"][0], z[:none], self.scenario_stores, rows, weight)
        return self.alignment * loss


class DenseModel(nn.Module):
    """Everything after the lookups: data-parallel, the same on every rank.

    With `autocast` its products are made in bfloat16; parameters, loss and predictions stay float32.
    """

    def __init__(
        self, config: ModelConfig, shapes: Shapes, dim: int, autocast: bool = False
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.history_length = shapes.history_length
        self.user_dropout = config.user_dropout
        self.label_weights = shapes.label_weights
        self.scenario_embedding = nn.Embedding(shapes.scenarios, dim)
        nn.init.normal_(self.scenario_embedding.weight, std=0.1)
        read: list[FeatureShape | SequenceShape] = [*shapes.features, *shapes.sequences]
        width = BottomWidth(dim, block_width(read, shapes.features_width))
        self.backbone = BACKBONES[config.backbone](
            width, shapes.scenarios, config.hidden, config.dropout, shapes.tasks
        )
        self.meta = MetaNetworks(config.meta, shapes, width, dim) if config.meta.enabled else None
        self.features = (
            FeatureBlocks(shapes.features, dim, shapes.features_width, shapes.sequences)
            if read
            else None
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by the step size that they have, in the order of `parameters()`.

        Saved optimizer state depends on neither: it goes by the parameters' names.
        """
        of_meta = self.meta.parameter_groups() if self.meta is not None else {}
        elsewhere = {id(parameter) for group in of_meta.values() for parameter in group}
        dense = [parameter for parameter in self.parameters() if id(parameter) not in elsewhere]
        return {"dense": dense, **of_meta}

    def forward(
        self,
        pooled: KeyedTensor,
        sequences: dict[str, JaggedTensor],
        vectors: KeyedTensor | None,
        batch: Batch,
        weighted: KeyedTensor | None = None,
        further: Sequence[dict[str, JaggedTensor]] = (),
    ) -> tuple[Tensor, Predictions]:
        """Returns the loss (a sum over samples divided by the batch size) and the predictions."""
        steps = {
            key: part for collection in (sequences, *further) for key, part in collection.items()
        }
        products = (
            torch.autocast(batch.label.device.type, torch.bfloat16)
            if self.autocast
            else nullcontext()
        )
        with products:
            logits, extra, known = self._score(pooled, steps, vectors, batch, weighted)
        logits = logits.to(batch.label.dtype)
        # Divided by the batch size, not by the number of samples: on every rank and in a last, padded
        # batch each sample counts once and equally.
        losses = F.binary_cross_entropy_with_logits(
            logits[:, 0], batch.label, batch.weight, reduction="sum"
        )
        for task, label_weight in enumerate(self.label_weights):
            losses = losses + label_weight * F.binary_cross_entropy_with_logits(
                logits[:, task + 1], batch.extra_labels[:, task], batch.weight, reduction="sum"
            )
        logits = logits.detach()
        predictions = Predictions(
            logits[:, 0],
            batch.label,
            batch.weight,
            batch.scenario,
            known["user"],
            logits[:, 1:],
        )
        return losses / len(batch.label) + extra, predictions

    def _score(
        self,
        pooled: KeyedTensor,
        sequences: dict[str, JaggedTensor],
        vectors: KeyedTensor | None,
        batch: Batch,
        weighted: KeyedTensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns logits [B, tasks], the alignment loss, and which samples have knowledge, bool [B]."""
        meta = self.meta
        # Of the levels that are configured, standardised, [B, dim] each.
        knowledge = vectors if vectors is not None else {}
        known = {level: batch.knowledge[level].lengths().bool() for level in ("user", "item")}
        user = pooled["user"]
        if self.training and self.user_dropout:  # content has to do without ids, after DropoutNet
            hidden = torch.rand(len(user), device=user.device) < self.user_dropout
            user = user.masked_fill(hidden[:, None], 0.0)
        item = sequences["item"].to_padded_dense(1).squeeze(1)
        history = torch.zeros_like(item)
        if self.history_length:
            history = sequences["history"].to_padded_dense(self.history_length).sum(1)
            history = history / batch.ids["history"].lengths().clamp(min=1)[:, None]
        scenario = self.scenario_embedding(batch.scenario)
        read = meta.read(knowledge) if meta is not None else {}
        users, items = (read.get(level, {}) for level in ("user", "item"))
        if meta is not None:  # vectors as plain features; 0 where there is none
            item = item + items.get("input", 0.0)
            user = user + users.get("input", 0.0)
            scenario = scenario + meta.scenario_as_input(batch.scenario_knowledge)
        added: dict[str, Tensor] = {}
        if self.features is not None:
            added = self.features(
                pooled, weighted, batch.ids, batch.numbers, sequences, batch.present
            )
            user = user + added.get("user", 0.0)
            item = item + added.get("item", 0.0)
            scenario = scenario + added.get("scenario", 0.0)
        blocks = [user, item, scenario, history, user * item, history * item]
        x = torch.cat([*blocks, added[BLOCK]] if BLOCK in added else blocks, dim=1)
        h, extra = x, x.new_zeros(())
        codes: dict[str, tuple[Tensor, Tensor | None]] = {}
        if meta is not None:
            codes, told = meta.codes(users.get("code"), known["user"], batch.scenario_knowledge)
            if meta.alignment:
                extra = meta.align(codes, batch, told)
        if meta is not None and meta.user_layers is not None:
            h = meta.user_layers(x, codes["user"][0])
        logits = self.backbone(h, batch.scenario)
        if meta is not None and meta.scenario_layers is not None:
            logits = meta.scenario_layers(x, *codes["scenario"], logits)
        if meta is not None and meta.match is not None:
            both = known["user"] & known["item"]
            logits = logits + meta.match(
                (users["match"], items["match"]), knowledge["user"], knowledge["item"], both, codes
            )
        return logits, extra, known


# Where the state of `LLM4MSR.knowledge` lies, which is neither trained nor saved.
KNOWLEDGE_PREFIX = "knowledge."


class LLM4MSR(nn.Module):
    """Tables and dense model; what DistributedModelParallel wraps.

    Without `config.meta.enabled` this is the plain backbone. `tables` lists all tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        shapes: Shapes,
        dim: int,
        init_std: float,
        row_owners: ZeroCollisionTables | None = None,
        hash_zch: HashZch | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        of_items = [
            (key, sequence.steps)
            for sequence in shapes.sequences
            for key in sequence.keys_that_read("item")
        ]
        ids = [
            Table("user", shapes.user_rows, dim, ("user",)),
            Table(
                "item",
                shapes.item_rows,
                dim,
                ("item", "history", *(key for key, _ in of_items)),
                sequence=True,
                # The planner wants more than no ids of a feature that is never fed any.
                ids_per_sample=(
                    1,
                    shapes.history_length or 1e-3,
                    *(max(count, 1e-3) for _, count in of_items),
                ),
            ),
        ]
        frozen = [
            Table(level.knowledge, *shape, (level.name,), bytes_per_value=2, frozen=True)
            for level, shape in ((USER, shapes.user_vectors), (ITEM, shapes.item_vectors))
            if shape
        ]
        of_features = [feature.table() for feature in shapes.features if feature.rows]
        of_features += [table for sequence in shapes.sequences for table in sequence.gap_table()]
        weighted = [table for table in of_features if table.weighted]
        steps = [table for table in of_features if table.sequence]
        self.tables = [*ids, *of_features, *frozen]
        self.row_owners = row_owners
        self.sparse = SparseFeatures(
            pooled=[ids[0], *(one for one in of_features if not (one.weighted or one.sequence))],
            sequences=[*ids[1:], *steps],
            weighted=weighted,
            init_std=init_std,
            hash_zch=hash_zch,
        )
        self.knowledge = FrozenTables(frozen) if frozen else None
        self.dense = DenseModel(config, shapes, dim, autocast)

    def forward(self, batch: Batch) -> tuple[Tensor, Predictions]:
        """Joins ids and knowledge by key, then predicts."""
        if self.row_owners is not None:
            self.row_owners(batch.fresh)
        pooled, sequences = self.sparse(batch.ids)
        # A collection of its own: to the others weights mean nothing, sharded or not.
        weighted = self.sparse.look_up_weighted(batch.weighted)
        vectors = self.knowledge(batch.knowledge) if self.knowledge is not None else None
        further = self.sparse.look_up_further(batch.ids)
        return self.dense(pooled, sequences, vectors, batch, weighted, further)
