"""Configuration of the model: the backbone, and the meta networks that are put on it."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.backbones import BACKBONE_CLASSES
from trainer.config.tables import Section

if TYPE_CHECKING:  # type checkers want the names of a Literal written out
    Backbone = str
else:
    Backbone = Literal[tuple(BACKBONE_CLASSES)]


class MetaConfig(Section):
    """Hierarchical meta networks: how knowledge becomes layers.

    `form = residual` starts as the plain backbone; `form = linear` is the paper's linear generator.
    """

    enabled: bool = Field(default=False, description="Put meta layers on the backbone.")
    form: Literal["residual", "linear"] = Field(
        default="residual",
        description="residual: h + W(z)h + b(z) with zero-initialised W, b; linear: act(W(z)h + b(z)).",
    )
    kind: Literal["low_rank", "core", "gate"] = Field(
        default="low_rank",
        description="low_rank: W(z) is a sum of `rank` matrices; core: a generated core_width x core_width "
        "matrix between two shared ones, for wide layers; gate: a generated diagonal on a shared matrix.",
    )
    core_width: int = Field(default=16, ge=1, description="Width of the core of kind = core.")
    rank: int = Field(
        default=8, ge=1, description="Width of z, the bottleneck that every vector passes."
    )
    adapter_hidden: int | None = Field(
        default=None,
        ge=1,
        description="Hidden width between a vector and z; null projects directly.",
    )
    user_layers: int = Field(default=1, ge=0, description="User-level meta layers at the bottom.")
    scenario_layers: int = Field(
        default=1, ge=0, description="Scenario-level meta layers in parallel."
    )
    scenario_width: int = Field(default=32, ge=1, description="Width of the parallel branch.")
    fusion: Literal["sum", "concat", "gate"] = Field(
        default="sum",
        description="How the parallel branch meets the backbone. sum: of logits; concat: a small network "
        "of the branch and the backbone's logits, added; gate: the branch also scales these logits.",
    )
    alignment: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of a loss that draws z of a user to z of the scenarios with positive events.",
    )
    noise: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="Length of noise on user vectors, their own being 1, where z is made of them while "
        "training; `inputs` and the match read vectors as they are.",
    )
    dropout: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of users whose z is the default while training, as if they had no vector; "
        "`inputs` and the match read it all the same.",
    )
    item_knowledge: Literal["none", "input", "match"] = Field(
        default="none",
        description="input: item vectors enter the bottom input; match: also their match with user vectors.",
    )
    match_width: int = Field(
        default=16, ge=1, description="Width of the projections that are matched."
    )
    match_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of samples that go without the match while training, so that it does not learn "
        "by heart what their users said to their items.",
    )
    match_layers: list[Literal["user", "scenario"]] = Field(
        default=[],
        max_length=2,
        description="Levels that generate a meta layer on the match.",
    )
    inputs: list[Literal["user", "scenario"]] = Field(
        default=[],
        max_length=2,
        description="Levels whose vectors also enter the bottom input, projected onto the embedding of "
        "the user or scenario: knowledge as a plain feature, without a generated layer.",
    )
    strategy: Literal["auto", "fused", "grouped", "reference", "warp_specialised"] = Field(
        default="auto",
        description="Implementation of the meta-layer op. warp_specialised is experimental: compiled for "
        "H100 and H200, never run; auto never takes it.",
    )

    def reads(self, level: Literal["user", "scenario"]) -> bool:
        """Whether a generated layer or the alignment reads the code of this level."""
        layers = self.user_layers if level == "user" else self.scenario_layers
        return layers > 0 or level in self.match_layers or self.alignment > 0

    @model_validator(mode="after")
    def _match_layers_need_the_match(self) -> "MetaConfig":
        if self.match_layers and self.item_knowledge != "match":
            raise ValueError(
                "match_layers act on the match: set item_knowledge to match, or match_layers to []"
            )
        for field in ("match_layers", "inputs"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field}: name a level once")
        return self

    @model_validator(mode="after")
    def _kind_has_the_strategy(self) -> "MetaConfig":
        if self.strategy == "warp_specialised" and self.kind == "gate":
            raise ValueError(
                "strategy warp_specialised has no diagonals, which kind gate is: use auto"
            )
        return self

    @model_validator(mode="after")
    def _something_is_added_and_read(self) -> "MetaConfig":
        """Refuses what would train as if it were not set."""
        if not self.enabled:
            return self
        layers = self.user_layers + self.scenario_layers + len(self.match_layers)
        if not layers and not self.inputs and self.item_knowledge == "none":
            raise ValueError(
                "nothing is added to the backbone: set user_layers, scenario_layers, inputs or "
                "item_knowledge, or enabled to false"
            )
        if self.alignment and not layers:
            raise ValueError(
                "alignment draws codes together that no layer reads: set user_layers or "
                "scenario_layers, or alignment to 0"
            )
        if self.match_dropout and self.item_knowledge != "match":
            raise ValueError(
                "match_dropout leaves out a match that is not there: set item_knowledge to match, or "
                "match_dropout to 0"
            )
        return self


class ModelConfig(Section):
    """The backbone, and what is put on it."""

    backbone: Backbone = Field(default="star", description="Multi-scenario backbone.")
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default=[64, 32], min_length=1, description="Widths of the backbone's layers."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in the backbone.")
    user_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of training samples whose user id is hidden (its vector counts as 0, as that "
        "of an unknown user nearly is), so that the model learns what else tells of a user.",
    )
    meta: MetaConfig = MetaConfig()
