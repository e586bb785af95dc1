"""What is compared: data sets, arms and the configurations that every arm is tuned over."""

from dataclasses import dataclass, field
from typing import Any

from llm_knowledge.levels import LEVELS

SEEDS = 5
# Two seeds of one setting differ by so much in the AUC on the valid split (Food-Kitchen, 70 cells: .0043 is
# the median standard deviation, times the root of 2). Trials that are as close are decided by the mean of
# several seeds.
CLOSE = 0.006
DECIDING_SEEDS = 3


@dataclass(frozen=True)
class DataSet:
    """One log.

    Attributes:
        prepare: Words of the command that prepares it, without --out.
        changes: Settings of every run on it.
        trials: Settings that every arm tries with its first seed, to keep the best on the valid split.
        held_out_users: Share of users to hold out where `prepare` itself cannot: its log is prepared
            once more.
    """

    prepare: tuple[str, ...]
    changes: dict[str, Any]
    trials: list[dict[str, Any]]
    held_out_users: float = 0.0


def _trials(*steps: tuple[float, float, float]) -> list[dict[str, Any]]:
    """From step sizes of dense parameters, meta networks and tables."""
    return [
        {
            "train.learning_rate": dense,
            "train.meta_learning_rate": meta,
            "tables.learning_rate": table,
            "model.dropout": 0.3,
        }
        for dense, meta, table in steps
    ]


# A model that knows the ids of all training users learns little from their texts.
_ALWAYS: dict[str, Any] = {"model.user_dropout": 0.5, "train.patience": 2}

DATASETS = {
    "movielens": DataSet(
        # Few users: half of them are held out, so that there is something to be seen of new ones.
        ("prepare", "movielens", "--held-out-users", "0.5"),
        _ALWAYS | {"train.eval_every": 40},
        _trials((1e-3, 5e-3, 0.02), (3e-4, 1e-3, 0.005)),
    ),
    "food_kitchen": DataSet(
        ("prepare", "food-kitchen", "--held-out-users", "0.2"),
        # Its profile window has positives only: to train on it would teach that everything is bought.
        _ALWAYS | {"data.train_splits": ["train"], "train.eval_every": 80},
        # What was left of a wider search with SharedBottom: the last is the best of "alone", "features"
        # and "llm4msr", and twice its steps are worse for each. A third, (5e-4, 5e-3, 0.05), was chosen
        # by none of the 35 arms of seven backbones that tried it, and is no longer tried.
        _trials((2e-3, 1e-2, 0.02), (5e-3, 1e-2, 0.1)),
    ),
    "simulated": DataSet(
        (
            "simulate",
            "--users",
            "2000",
            "--items",
            "1000",
            "--scenarios",
            "3",
            "--events",
            "100000",
            "--seed",
            "1",
        ),
        # By ids alone the AUC stands still for some evaluations before it rises: less patience, or the
        # smaller steps that the other logs need, would end the backbone's training there.
        _ALWAYS | {"train.eval_every": 40, "train.patience": 10, "train.epochs": 25},
        _trials((5e-3, 5e-3, 0.05), (2e-3, 1e-2, 0.05)),
        held_out_users=0.2,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way of using knowledge.

    Attributes:
        meta: Settings below model.meta; empty is the backbone alone.
        stores: Level to kind of store: "true", "shuffled", "random", "constant", "leak", "tastes" (made
            with `TEMPLATES`) or "tastes-shuffled".
        question: What the arm is there to tell.
        layer_step: Step size of the meta networks as a share of that of inputs and match.
        tuned_as: Another arm, whose chosen trial is taken in place of trials of its own.
    """

    question: str
    stores: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    layer_step: float = 1.0
    tuned_as: str = ""


TEMPLATES = {"user": "user_tastes", "item": "item_categories"}
_TRUE = dict.fromkeys(LEVELS, "true")
_TASTES = {**_TRUE, "user": "tastes", "item": "tastes"}
_LAYERS = {"kind": "gate"}
_FULL = {**_LAYERS, "item_knowledge": "match", "inputs": ["user"]}
_NO_LAYERS = {"user_layers": 0, "scenario_layers": 0}
ARMS = {
    "alone": Arm("the backbone"),
    "llm4msr": Arm(
        "user and scenario layers, item knowledge, its match with the user's, the user's vector as an "
        "input",
        _TRUE,
        _FULL,
    ),
    "shuffled": Arm("the same, user vectors at other users", {**_TRUE, "user": "shuffled"}, _FULL),
    "shuffled_alike": Arm(
        "shuffled with the step sizes that llm4msr's trials chose, where its own chose others",
        {**_TRUE, "user": "shuffled"},
        _FULL,
        tuned_as="llm4msr",
    ),
    "llm4msr_alike": Arm(
        "llm4msr with the step sizes that the backbone's trials chose, where its own chose others",
        _TRUE,
        _FULL,
        tuned_as="alone",
    ),
    "random": Arm("the same, random user vectors", {**_TRUE, "user": "random"}, _FULL),
    "constant": Arm(
        "the same parameters, one vector for all keys of a level",
        dict.fromkeys(LEVELS, "constant"),
        _FULL,
    ),
    "low_rank": Arm(
        "llm4msr with layers of low rank in place of gates", _TRUE, _FULL | {"kind": "low_rank"}
    ),
    "slow_layers": Arm(
        "llm4msr, its generated layers learning at a tenth of the step size", _TRUE, _FULL, 0.1
    ),
    "no_layers": Arm(
        "llm4msr without generated layers, the scenario's vector as an input too",
        _TRUE,
        {**_FULL, **_NO_LAYERS, "inputs": ["user", "scenario"]},
    ),
    "no_input": Arm(
        "llm4msr without the user's vector as an input", _TRUE, {**_FULL, "inputs": []}
    ),
    "no_match": Arm(
        "llm4msr, item knowledge as an input only: without its match with the user's",
        _TRUE,
        {**_FULL, "item_knowledge": "input"},
    ),
    "match_dropout": Arm(
        "llm4msr, its match left out of half of the samples while training",
        _TRUE,
        {**_FULL, "match_dropout": 0.5},
    ),
    "match_layers": Arm(
        "llm4msr with layers on the match that user and scenario generate",
        _TRUE,
        {**_FULL, "match_layers": ["user", "scenario"]},
    ),
    "aligned": Arm(
        "llm4msr with a loss that aligns the codes of users and scenarios",
        _TRUE,
        {**_FULL, "alignment": 0.1},
    ),
    "paper": Arm(
        "the paper's: linear generator, user and scenario layers only",
        {"user": "true", "scenario": "true"},
        {"form": "linear"},
    ),
    "user_only": Arm("user layers only", {"user": "true"}, {**_LAYERS, "scenario_layers": 0}),
    "scenario_only": Arm(
        "scenario layers only", {"scenario": "true"}, {**_LAYERS, "user_layers": 0}
    ),
    "item_only": Arm(
        "item knowledge as an input, nothing else",
        {"item": "true"},
        {**_NO_LAYERS, "item_knowledge": "input"},
    ),
    "features": Arm(
        "all vectors as plain input features, no meta layers, no match",
        _TRUE,
        {**_NO_LAYERS, "inputs": ["user", "scenario"], "item_knowledge": "input"},
    ),
    "match_only": Arm(
        "item knowledge and its match with the user's, no meta layers",
        {"user": "true", "item": "true"},
        {**_NO_LAYERS, "item_knowledge": "match"},
    ),
    "tastes": Arm(
        "llm4msr, prompts also say which categories a user likes more and less, and those of items",
        _TASTES,
        _FULL,
    ),
    "tastes_shuffled": Arm(
        "the same, user vectors at other users", {**_TASTES, "user": "tastes-shuffled"}, _FULL
    ),
    "leak": Arm(
        "llm4msr, the as-of rule broken: prompts have read the training events",
        {**_TRUE, "user": "leak"},
        _FULL,
    ),
}
MAIN = ("alone", "llm4msr", "shuffled")
# The differences that docs/results reports: of an arm to others, and of others to alone.
DIFFERENCES = {
    "llm4msr": (
        "alone", "shuffled", "shuffled_alike", "random", "constant", "low_rank", "slow_layers",
        "no_layers", "no_input", "no_match", "features", "match_only", "item_only", "leak",
    ),
    "llm4msr_alike": ("shuffled",),  # alike too where the backbone and the control chose the same trial
    "match_dropout": ("llm4msr", "no_match", "features"),
    "match_layers": ("llm4msr",),
    "aligned": ("llm4msr",),
    "match_only": ("item_only",),
    "slow_layers": ("features",),
    "no_layers": ("features",),
    "no_match": ("features",),
    "tastes": ("alone", "tastes_shuffled", "llm4msr"),
    "alone": (
        "llm4msr_alike", "no_match", "match_dropout", "features", "paper", "user_only",
        "scenario_only", "item_only", "leak",
    ),
}  # fmt: skip

# What every arm tries besides, with the step sizes that its trials chose: on some backbones of unlike
# families, where a share of the training users is held out.
REGULARISATION: dict[str, dict[str, Any]] = {
    "dropout .1": {"model.dropout": 0.1},
    "dropout .5": {"model.dropout": 0.5},
    "weight decay .01": {"train.weight_decay": 0.01},
    "user dropout 0": {"model.user_dropout": 0.0},
    "user dropout .8": {"model.user_dropout": 0.8},
}
REGULARISED = (
    "alone", "llm4msr", "shuffled", "features", "random", "user_only", "scenario_only", "slow_layers",
)  # fmt: skip
TUNED_ON = ("shared_bottom", "star", "pepnet")
TUNING_USERS = 0.2

RESAMPLES = 500  # of the users and seeds, for every interval

# How sensitive each form of the generator is to the step size of the meta networks.
FORMS = ("residual", "linear")
META_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SENSITIVITY_SEEDS = 3
