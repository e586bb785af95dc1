"""Ways of knowledge through the dense model: which samples a vector, a default or a batch mate reaches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from tests.trainer.models.test_model import (
    DIM,
    KINDS,
    ROWS,
    SCENARIOS,
    VECTOR,
    batch_of,
    inputs,
    model,
    shapes,
)
from trainer.config.model import MetaConfig, ModelConfig
from trainer.data.loading.batch import Batch
from trainer.models.layers import Dropout
from trainer.models.llm4msr import DenseModel
from trainer.models.meta import Generator, ScenarioMetaLayers, UserMetaLayers

NO_USER, NO_SCENARIO, NO_ITEM = 3, 4, 5  # the row of `inputs` that lacks it


def trained(dense: DenseModel, only: str = "") -> DenseModel:
    """A model whose parameters have left what they begin with: zeros hide what is behind them."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.startswith(only):
                parameter += 0.3 * torch.randn_like(parameter)
    return dense.eval()


def rows_of(at: list[int]) -> tuple[KeyedTensor, dict[str, JaggedTensor], KeyedTensor, Batch]:
    """Some rows of `inputs` as a batch of their own."""
    pooled, sequences, vectors, batch = inputs()
    pick = torch.tensor(at)
    history = [sequences["history"].to_dense()[row] for row in at]
    lengths = torch.tensor([len(one) for one in history])
    ones = torch.ones(len(at), dtype=torch.long)
    cut = batch_of(
        lengths,
        {level: batch.knowledge[level].lengths()[pick] for level in ("user", "item")},
        scenario=batch.scenario[pick],
        scenario_knowledge=batch.scenario_knowledge[pick],
        label=batch.label[pick],
        weight=batch.weight[pick],
    )
    return (
        KeyedTensor(["user"], [DIM], pooled["user"][pick]),
        {
            "item": JaggedTensor(sequences["item"].values()[pick], lengths=ones),
            "history": JaggedTensor(torch.cat(history), lengths=lengths),
        },
        KeyedTensor(["user", "item"], [VECTOR] * 2, vectors.values()[pick]),
        cut,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("fusion", ["sum", "concat", "gate"])
@pytest.mark.parametrize("form", ["residual", "linear"])
@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_batch_mates(
    kind: dict, fusion: str, form: str, training: bool
) -> None:
    both = ["user", "scenario"]
    options = {"form": form, "fusion": fusion, "match_layers": both, "inputs": both, **kind}
    dense = trained(model("star", noise=0.0, dropout=0.0, **options))
    for module in dense.modules():
        if isinstance(module, Dropout):
            module.share = 0.0
    dense.train(training)
    whole = dense(*inputs())[1].logits
    assert whole.std() > 0.1
    for at in ([NO_USER], [NO_SCENARIO], [0, NO_ITEM], [6, 1, 2]):
        torch.testing.assert_close(dense(*rows_of(at))[1].logits, whole[at], rtol=1e-4, atol=1e-4)


def moved(dense: DenseModel, change: Callable[[tuple], object]) -> list[int]:
    """Rows whose logits a change of the model or of its inputs moves."""
    given = inputs()
    before = dense(*given)[1].logits
    with torch.no_grad():
        change(given)
    return (dense(*given)[1].logits != before).nonzero().flatten().tolist()


def test_who_has_no_vector_gets_the_learned_default_of_the_level() -> None:
    dense = trained(model("star", item_knowledge="none"))
    assert moved(dense, lambda _: dense.meta.user_adapter.default.add_(1.0)) == [NO_USER]
    assert moved(dense, lambda _: dense.meta.scenario_adapter.default.add_(1.0)) == [NO_SCENARIO]
    # Nothing else of a missing vector's place is read.
    others = [row for row in range(ROWS) if row != NO_USER]
    assert moved(dense, lambda given: given[2].values()[:, :VECTOR].add_(1.0)) == others


def test_a_missing_scenario_vector_is_no_other_scenarios() -> None:
    dense = trained(model("star", inputs=["scenario"]))
    reads_first = inputs()[3].scenario_knowledge == 0
    rows = reads_first.nonzero().flatten().tolist()
    assert moved(dense, lambda _: dense.meta.scenario_vectors[0].add_(1.0)) == rows


@pytest.mark.parametrize("layers", [[], ["user", "scenario"]])
def test_the_match_counts_where_both_are_known(layers: list[str]) -> None:
    options = {"user_layers": 0, "scenario_layers": 0, "match_layers": layers}
    dense = trained(model("star", **options), only="meta.match")
    dense.load_state_dict(model("star", enabled=False).state_dict(), strict=False)
    plain = model("star", enabled=False).eval()(*inputs())[1].logits
    matched = dense(*inputs())[1].logits != plain
    expected = [row for row in range(ROWS) if row not in (NO_USER, NO_ITEM)]
    assert matched.nonzero().flatten().tolist() == expected


def test_user_layers_are_below_the_backbone_and_scenario_layers_beside_it() -> None:
    dense = trained(model("star", item_knowledge="none"))
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            seen[name], seen[f"{name} out"] = given[0], found

        return hook

    parts = {
        "user": dense.meta.user_layers,
        "scenario": dense.meta.scenario_layers,
        "backbone": dense.backbone,
    }
    for name, part in parts.items():
        part.register_forward_hook(note(name))
    logits = dense(*inputs())[1].logits
    assert torch.equal(seen["backbone"], seen["user out"])
    assert torch.equal(seen["scenario"], seen["user"])  # both read the bottom input
    assert not torch.equal(seen["user out"], seen["user"])
    assert torch.equal(logits, seen["scenario out"][:, 0])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
def test_a_residual_user_layer_adds_what_it_generates(kind: dict) -> None:
    torch.manual_seed(2)
    stack = UserMetaLayers(6, 2, Generator(rank=3, residual=True, **kind))
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    h, z = torch.randn(ROWS, 6), torch.randn(ROWS, 3)
    first, second = stack.layers
    between = h + first(h, z)
    torch.testing.assert_close(stack(h, z), between + second(between, z))
    assert (first(h, z) < 0).any()  # so that an activation would show


def test_concatenation_reads_the_backbones_logits() -> None:
    torch.manual_seed(2)
    branch = ScenarioMetaLayers(6, 4, 1, Generator(rank=2), num_tasks=2, fusion="concat")
    for parameter in branch.parameters():
        nn.init.normal_(parameter)
    h, z, group = torch.randn(ROWS, 6), torch.randn(3, 2), torch.arange(ROWS) % 3
    logits = torch.randn(ROWS, 2)
    last = branch.layers[0](h, z, group, activation="leaky_relu")
    both = branch.hidden(torch.cat([last, logits], 1))
    torch.testing.assert_close(branch(h, z, group, logits), logits + branch.out(both))


def test_alignment_is_over_the_positives_that_read_both_vectors() -> None:
    dense = trained(model("star", alignment=0.7, noise=0.0, dropout=0.0))
    given = inputs()
    batch = given[3]
    batch.weight[:] = torch.arange(ROWS) * 0.25
    batch.label[NO_SCENARIO] = 1.0  # as that of NO_USER is
    loss = dense(*given)[0]
    dense.meta.alignment = 0.0
    plain = dense(*given)[0]
    adapter, vectors = dense.meta.user_adapter, given[2]["user"]
    z = nn.functional.normalize(adapter.rest(adapter.first(vectors)), dim=1)
    s = dense.meta.scenario_adapter.all_codes(dense.meta.scenario_vectors)[:-1]
    scores = (z @ nn.functional.normalize(s, dim=1).t() / 0.2).log_softmax(1)
    expected = sum(
        -0.7 * float(batch.weight[row]) * scores[row, batch.scenario_knowledge[row]]
        for row in range(ROWS)
        if batch.label[row] == 1 and row not in (NO_USER, NO_SCENARIO)
    )
    torch.testing.assert_close(loss - plain, expected / ROWS, rtol=1e-4, atol=1e-5)


def dated(dates: int) -> DenseModel:
    """A model whose scenarios have as many stores as dates, the vectors being those of one."""
    found, config = shapes(), MetaConfig(enabled=True, alignment=1.0, noise=0.0, dropout=0.0)
    assert found.scenario_vectors is not None
    found = replace(
        found,
        scenario_vectors=found.scenario_vectors.repeat(dates, 1),
        scenario_stores=torch.arange(dates).repeat_interleave(SCENARIOS),
    )
    torch.manual_seed(0)
    return DenseModel(ModelConfig(hidden=[8, 6], meta=config), found, DIM)


def test_alignment_knows_no_scenario_of_another_date() -> None:
    one, three = trained(dated(1)), trained(dated(3))
    given = inputs()
    expected = one(*given)[0]
    for date in range(3):  # the event's own store, whichever it is, and nothing of the others
        rows = inputs()[3].scenario_knowledge
        given[3].scenario_knowledge = torch.where(rows < 0, -1, rows + date * SCENARIOS)
        torch.testing.assert_close(three(*given)[0], expected)
        others = three.meta.scenario_stores != date
        with torch.no_grad():
            three.meta.scenario_vectors[others] += torch.randn(2 * SCENARIOS, VECTOR)
        torch.testing.assert_close(three(*given)[0], expected)
        three.meta.scenario_vectors.copy_(one.meta.scenario_vectors.repeat(3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_layers": 0, "scenario_layers": 0}, "nothing is added"),
        (
            {"user_layers": 0, "scenario_layers": 0, "inputs": ["user"], "alignment": 0.1},
            "no layer reads",
        ),
        ({"match_dropout": 0.5}, "a match that is not there"),
        ({"noise": float("inf")}, "finite"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaConfig(enabled=True, **options)
    for used in ({"inputs": ["user"]}, {"item_knowledge": "input"}):
        MetaConfig(enabled=True, user_layers=0, scenario_layers=0, **used)
    if "noise" not in options:
        MetaConfig(enabled=False, **options)
