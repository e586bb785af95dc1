"""Backbones and meta networks: their defining properties."""

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from trainer.config.backbones import BACKBONE_CLASSES
from trainer.config.model import MetaConfig, ModelConfig
from trainer.data.loading.batch import Batch
from trainer.models import BACKBONES
from trainer.models.llm4msr import DenseModel
from trainer.models.meta import (
    Generator,
    KnowledgeAdapter,
    KnowledgeMatch,
    MetaLayer,
    ScenarioMetaLayers,
    UserMetaLayers,
    alignment_loss,
    standardise,
)
from trainer.models.shapes import Predictions, Shapes
from trainer.models.star import StarLinear

ROWS, DIM, VECTOR, SCENARIOS = 12, 4, 6, 3


def shapes() -> Shapes:
    torch.manual_seed(7)
    return Shapes(
        user_rows=10,
        item_rows=10,
        history_length=5,
        scenarios=SCENARIOS,
        user_vectors=(10, VECTOR),
        item_vectors=(10, VECTOR),
        scenario_vectors=torch.randn(SCENARIOS, VECTOR),
        scenario_stores=torch.zeros(SCENARIOS, dtype=torch.long),
    )


def batch_of(lengths: Tensor, known: dict[str, Tensor], **columns: Tensor) -> Batch:
    """A batch of one user, one item and so many history items per row, all of id 0."""
    ones = torch.ones(len(lengths), dtype=torch.long)
    found = [known[level].long() for level in ("user", "item")]
    return Batch(
        ids=KeyedJaggedTensor(
            ["user", "item", "history"],
            torch.zeros(2 * len(lengths) + int(lengths.sum()), dtype=torch.long),
            lengths=torch.cat([ones, ones, lengths]),
        ),
        knowledge=KeyedJaggedTensor(
            ["user", "item"],
            torch.zeros(int(sum(one.sum() for one in found)), dtype=torch.long),
            lengths=torch.cat(found),
        ),
        **columns,
    )


def inputs() -> tuple[KeyedTensor, dict[str, JaggedTensor], KeyedTensor, Batch]:
    """Looked-up embeddings and the batch they belong to; row 3 knows no user, row 5 no item."""
    torch.manual_seed(1)
    ones, lengths = torch.ones(ROWS, dtype=torch.long), torch.arange(ROWS) % 5
    known = {"user": torch.arange(ROWS) != 3, "item": torch.arange(ROWS) != 5}
    pooled = KeyedTensor(["user"], [DIM], torch.randn(ROWS, DIM))
    sequences = {
        "item": JaggedTensor(torch.randn(ROWS, DIM), lengths=ones),
        "history": JaggedTensor(torch.randn(int(lengths.sum()), DIM), lengths=lengths),
    }
    vectors = [torch.randn(ROWS, VECTOR) * known[level][:, None] for level in ("user", "item")]
    batch = batch_of(
        lengths,
        known,
        scenario=torch.arange(ROWS) % SCENARIOS,
        scenario_knowledge=torch.where(torch.arange(ROWS) == 4, -1, torch.arange(ROWS) % SCENARIOS),
        label=(torch.arange(ROWS) % 2).float(),
        weight=torch.ones(ROWS),
    )
    return (
        pooled,
        sequences,
        KeyedTensor(["user", "item"], [VECTOR] * 2, torch.cat(vectors, 1)),
        batch,
    )


def model(backbone: str, **meta: object) -> DenseModel:
    torch.manual_seed(0)
    options = {"enabled": True, "item_knowledge": "match", "user_layers": 2, **meta}
    config = ModelConfig(backbone=backbone, hidden=[8, 6], meta=MetaConfig(**options))
    return DenseModel(config, shapes(), DIM)


def logits(dense: nn.Module) -> Tensor:
    found: Predictions = dense.eval()(*inputs())[1]
    return found.logits


def test_configuration_names_every_backbone() -> None:
    """One dict: a name more there is all that the check of a configuration and the models need."""
    assert list(BACKBONES) == list(BACKBONE_CLASSES)
    assert get_args(ModelConfig.model_fields["backbone"].annotation) == tuple(BACKBONES)
    assert len(set(BACKBONES.values())) == len(BACKBONES)
    assert all(
        f"{net.__module__}.{net.__name__}" == f"trainer.models.{BACKBONE_CLASSES[name]}"
        for name, net in BACKBONES.items()
    )


@pytest.mark.parametrize("item_knowledge", ["none", "input", "match"])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_model_says_the_groups_of_its_parameters(enabled: bool, item_knowledge: str) -> None:
    """By the names that groups went by before: a run's updates, and their order, are unchanged."""
    dense = model("star", enabled=enabled, item_knowledge=item_knowledge, inputs=["scenario"])
    groups: dict[str, list[str]] = {"dense": []}
    if enabled:
        groups |= {"meta": [], "knowledge": []}
    for name, _ in dense.named_parameters():
        kind = "meta" if name.startswith("meta.") else "dense"
        if name.startswith(("meta.inputs.", "meta.match.")):
            kind = "knowledge"
        groups[kind].append(name)
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    assert groups == {
        group: [names[id(parameter)] for parameter in parameters]
        for group, parameters in dense.parameter_groups().items()
    }
    assert sum(map(len, groups.values())) == len(names)


@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_residual_form_starts_as_the_plain_backbone(backbone: str) -> None:
    plain, lifted = model(backbone, enabled=False), model(backbone)
    torch.testing.assert_close(logits(lifted), logits(plain), rtol=0, atol=0)
    assert sum(p.numel() for p in lifted.parameters()) > sum(p.numel() for p in plain.parameters())


KINDS = [{"kind": "low_rank"}, {"kind": "core", "core_width": 5}, {"kind": "gate"}]
OPTIONS = [
    *KINDS,
    {"scenario_layers": 2},
    {"fusion": "concat"},
    {"fusion": "gate", "scenario_layers": 3},
    {"match_layers": ["user", "scenario"]},
    {"adapter_hidden": 7},
    {"alignment": 0.3},
    {"inputs": ["user", "scenario"]},
    {"inputs": ["user", "scenario"], "user_layers": 0, "scenario_layers": 0},
    # Codes are also made where only the match reads them.
    {"user_layers": 0, "scenario_layers": 0, "match_layers": ["scenario"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_the_residual_form_starts_as_the_plain_backbone(options: dict) -> None:
    plain, lifted = model("star", enabled=False), model("star", **options)
    torch.testing.assert_close(logits(lifted), logits(plain))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["residual", "linear"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_meta_parameter_learns(form: str, options: dict) -> None:
    dense = model("star", form=form, **options).train()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.5)
    before = {name: value.clone() for name, value in dense.meta.named_parameters()}
    for _ in range(6):  # what begins at zero passes its gradient on only once it has moved
        optimizer.zero_grad()
        dense(*inputs())[0].backward()
        optimizer.step()
    still = [
        name for name, value in dense.meta.named_parameters() if torch.equal(value, before[name])
    ]
    assert still == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "fusion"),
    [*((name, "sum") for name in BACKBONES), ("star", "concat"), ("star", "gate")],
)
def test_every_backbone_takes_several_labels_and_llm4msr(backbone: str, fusion: str) -> None:
    torch.manual_seed(0)
    meta = MetaConfig(enabled=True, item_knowledge="match", fusion=fusion)
    config = ModelConfig(backbone=backbone, hidden=[8, 6], dropout=0.0, meta=meta)
    dense = DenseModel(config, replace(shapes(), label_weights=(0.5, 2.0)), DIM).train()
    *looked_up, batch = inputs()
    batch.extra_labels = torch.stack([1 - batch.label, batch.label], dim=1)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        dense(*looked_up, batch)[0].backward()
        optimizer.step()
    found = dense.eval()(*looked_up, batch)[1]
    # The second label says the opposite of the first: one logit per sample could not learn both.
    learned = torch.cat([found.logits[:, None], found.extra_logits], dim=1) > 0
    wanted = torch.stack([batch.label, 1 - batch.label, batch.label], dim=1) > 0
    assert (learned == wanted).float().mean() > 0.9


def test_linear_form_differs_by_user_knowledge_from_the_start() -> None:
    dense = model("star", form="linear", item_knowledge="none")
    pooled, sequences, vectors, batch = inputs()
    doubled = KeyedTensor(["user", "item"], [VECTOR] * 2, vectors.values().flip(0))
    one = dense.eval()(pooled, sequences, vectors, batch)[1].logits
    two = dense.eval()(pooled, sequences, doubled, batch)[1].logits
    assert not torch.allclose(one, two)


def test_linear_form_is_the_papers_generator() -> None:
    """Each level's layers are leaky_relu(W(z) h + b(z)), W and b linear in the code; no skip, no gate."""
    torch.manual_seed(2)
    users = UserMetaLayers(5, 2, Generator(rank=3, residual=False))
    branch = ScenarioMetaLayers(5, 4, 2, Generator(rank=3, residual=False), num_tasks=1)
    h, z, group = torch.randn(ROWS, 5), torch.randn(ROWS, 3), torch.arange(ROWS) % 4
    logits = torch.randn(ROWS, 1)
    for found, layers, codes in (
        (users(h, z), users.layers, z),
        (branch(h, z[:4], group, logits), branch.layers, z[:4][group]),
    ):
        expected = h
        for layer in layers:
            weight = layer.weight[-1] + torch.einsum("br,roi->boi", codes, layer.weight[:-1])
            bias = layer.bias[-1] + codes @ layer.bias[:-1]
            expected = torch.einsum("boi,bi->bo", weight, expected) + bias
            expected = nn.functional.leaky_relu(expected, 0.01)
        if layers is branch.layers:
            expected = logits + branch.out(expected)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_that_begins_at_zero_does_so_in_both_forms(kind: dict, residual: bool) -> None:
    layer = MetaLayer(6, 6, Generator(rank=3, residual=residual, **kind), zero=True)
    assert layer(torch.randn(ROWS, 6), torch.randn(ROWS, 3)).abs().max() == 0


@pytest.mark.parametrize("item_dim", [VECTOR, VECTOR - 2])
def test_match_is_a_bilinear_form_and_a_small_network_where_both_are_known(item_dim: int) -> None:
    torch.manual_seed(4)
    match = KnowledgeMatch(VECTOR, item_dim, 3, num_tasks=2)
    nn.init.normal_(match.out.weight)
    users, items = torch.randn(ROWS, VECTOR), torch.randn(ROWS, item_dim)
    known = torch.arange(ROWS) % 3 > 0
    found = match((match.user(users), match.item(items)), users, items, known, {})
    features = (users @ match.user.weight.t()) * (items @ match.item.weight.t())
    if item_dim == VECTOR:
        features = torch.cat([features, 5 * (users * items).sum(1, keepdim=True)], dim=1)
    hidden, bilinear = match.out.weight.split([16, features.shape[1]], dim=1)
    expected = match.hidden(features) @ hidden.t() + features @ bilinear.t()
    torch.testing.assert_close(found[known], expected[known])
    assert found[~known].abs().max() == 0
    assert expected[~known].abs().min() > 0


def test_match_is_left_out_of_its_share_of_samples_in_training_only() -> None:
    match = KnowledgeMatch(VECTOR, VECTOR, 3, num_tasks=1, dropout=0.25)
    nn.init.normal_(match.out.weight)
    users, items = torch.randn(4000, VECTOR), torch.randn(4000, VECTOR)
    known = torch.arange(4000) % 2 == 0
    given = ((match.user(users), match.item(items)), users, items, known, {})
    whole, training = match.eval()(*given), match.train()(*given)
    assert torch.equal((whole != 0).squeeze(1), known)
    left = (training != 0).squeeze(1)
    assert torch.equal(training[left], whole[left])
    assert not left[~known].any()
    assert 0.7 < left[known].float().mean() < 0.8


@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_no_output_depends_on_batch_mates(backbone: str) -> None:
    torch.manual_seed(3)
    net = BACKBONES[backbone](5, SCENARIOS, [8, 6], 0.0, 1)
    x, scenario = torch.randn(ROWS, 5), torch.arange(ROWS) % SCENARIOS
    whole = net(x, scenario)
    for row in range(ROWS):
        torch.testing.assert_close(net(x[row : row + 1], scenario[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_own_parameters_get_no_gradient_from_another_scenario(backbone: str) -> None:
    net = BACKBONES[backbone](5, SCENARIOS, [8, 6], 0.0, 1)
    scenario = torch.zeros(ROWS, dtype=torch.long)
    net(torch.randn(ROWS, 5), scenario).sum().backward()
    own = [p for p in net.parameters() if p.dim() > 1 and p.shape[0] == SCENARIOS]
    assert own
    for parameter in own:
        assert parameter.grad is not None
        assert parameter.grad[1:].abs().max() == 0
        assert parameter.grad[0].abs().max() > 0


def test_star_weights_are_products_of_shared_and_own() -> None:
    layer = StarLinear(SCENARIOS, 4, 3)
    nn.init.normal_(layer.own_weight)
    nn.init.normal_(layer.own_bias)
    x = torch.randn(2, 4)
    for s in range(SCENARIOS):
        expected = (
            x @ (layer.shared.weight * layer.own_weight[s]).t()
            + layer.shared.bias
            + layer.own_bias[s]
        )
        torch.testing.assert_close(layer(x, torch.full((2,), s)), expected)


@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_parameter_count(backbone: str) -> None:
    i, widths = 5, [8, 6]
    net = BACKBONES[backbone](i, SCENARIOS, widths, 0.0, 1)
    dense = [a * b + b for a, b in itertools.pairwise([i, *widths])]
    if backbone == "shared_bottom":
        expected = sum(dense) + SCENARIOS * ((6 * 3 + 3) + (3 + 1))
    else:
        star = (1 + SCENARIOS) * (sum(dense) + 6 + 1)
        expected = star + 2 * i + 2 * SCENARIOS * i + (i * 6 + 6) + (6 + 1)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_meta_layers_are_the_sum_of_their_slices(kind: dict) -> None:
    torch.manual_seed(5)
    layer = MetaLayer(6, 4, Generator(rank=3, residual=False, **kind))
    h, z = torch.randn(ROWS, 6), torch.randn(ROWS, 3)
    zeros, units = torch.zeros(ROWS, 3), torch.eye(3)
    base = layer(h, zeros)
    shares = sum(z[:, [j]] * (layer(h, units[j].expand(ROWS, 3)) - base) for j in range(3))
    torch.testing.assert_close(layer(h, z), base + shares, rtol=1e-4, atol=1e-5)
    rows = torch.arange(ROWS) % 5
    torch.testing.assert_close(layer(h, z[:5], rows), layer(h, z[rows]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(h, z, activation="relu"), layer(h, z).relu())


def test_alignment_draws_codes_to_the_scenarios_of_positives_only() -> None:
    scenarios = torch.eye(3)
    user = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True)
    store = torch.zeros(3, dtype=torch.long)
    right = alignment_loss(user, scenarios, store, torch.tensor([0, 1]), torch.ones(2))
    wrong = alignment_loss(user, scenarios, store, torch.tensor([1, 0]), torch.ones(2))
    assert right < wrong
    weight = torch.tensor([1.0, 0.0])
    alignment_loss(user, scenarios, store, torch.tensor([2, 0]), weight).backward()
    assert user.grad is not None
    assert user.grad[0, 2] < 0  # a step against the gradient moves towards scenario 2
    assert user.grad[1].abs().max() == 0


def test_alignment_leaves_the_default_code_alone() -> None:
    """It stands for all users without knowledge; at 0, where it begins, its direction is undefined."""
    dense = model("star", alignment=1.0, dropout=0.5, noise=0.0).train()
    batch = inputs()[3]
    known = batch.knowledge["user"].lengths().bool()
    code = dense.meta.read(inputs()[2])["user"]["code"]
    codes, read = dense.meta.codes(code, known, batch.scenario_knowledge)
    assert known.sum() > read.sum() > 0
    dense.meta.align(codes, batch, read).backward()
    assert dense.meta.user_adapter.first.weight.grad.abs().max() > 0
    assert dense.meta.user_adapter.default.grad.abs().max() == 0


def test_fusions_differ_once_trained() -> None:
    found = []
    for fusion in ("sum", "concat", "gate"):
        dense = model("star", fusion=fusion, noise=0.0, dropout=0.0)
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            dense(*inputs())[0].backward()
            optimizer.step()
        found.append(logits(dense))
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(found, 2))


def test_scaled_logits_of_the_gate_stay_between_nothing_and_double() -> None:
    branch = ScenarioMetaLayers(6, 4, 1, Generator(rank=2), num_tasks=1, fusion="gate")
    nn.init.normal_(branch.gate.weight, std=5.0)
    h, z, logit = torch.randn(ROWS, 6), torch.randn(3, 2), torch.randn(ROWS, 1)
    ratio = branch(h, z, torch.arange(ROWS) % 3, logit) / logit
    assert ((ratio > 0) & (ratio < 2)).all()
    assert ratio.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_overfits_a_handful_of_samples(backbone: str) -> None:
    dense = model(backbone, noise=0.0, dropout=0.0).train()
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = dense(*inputs())[0]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_unknown_rows_get_the_default_and_dropout_makes_more_of_them() -> None:
    adapter = KnowledgeAdapter(VECTOR, 3, noise=0.0, dropout=0.5)
    nn.init.constant_(adapter.default, 9.0)
    vectors, known = torch.randn(2000, VECTOR), torch.arange(2000) % 2 == 0
    assert torch.equal((adapter.eval()(adapter.first(vectors), known)[0] == 9).all(1), ~known)
    codes, read = adapter.train()(adapter.first(vectors), known)
    dropped = (codes == 9).all(1)
    assert torch.equal(dropped, ~read)
    assert dropped[1::2].all()
    assert 400 < int(dropped[::2].sum()) < 600


@pytest.mark.parametrize("rank", [3, VECTOR + 2])  # also more numbers than the vector has
def test_noise_on_the_code_is_what_noise_on_the_vector_would_become(rank: int) -> None:
    adapter = KnowledgeAdapter(VECTOR, rank, noise=0.5, dropout=0.0).train()
    vectors, known = torch.zeros(200_000, VECTOR), torch.ones(200_000, dtype=torch.bool)
    with torch.no_grad():
        found = torch.cov(adapter(adapter.first(vectors), known)[0].t())
        vectors += 0.5 / VECTOR**0.5 * torch.randn_like(vectors)
        expected = torch.cov(adapter.eval()(adapter.first(vectors), known)[0].t())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03 * float(expected.max()))


def test_standardised_vectors_are_centred_and_of_length_one() -> None:
    vectors = (np.random.default_rng(0).normal(3, 50, (4, 6))).astype(np.float16)
    vectors[2] = 0
    found = standardise(vectors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0, 1], atol=1e-6)


def test_hidden_user_ids_are_hidden_in_training_only() -> None:
    dense = model("shared_bottom", noise=0.0, dropout=0.0)
    pooled, sequences, vectors, batch = inputs()
    other = KeyedTensor(["user"], [DIM], torch.randn(ROWS, DIM))
    dense.user_dropout = 1.0  # the configuration allows less only

    def loss(users: KeyedTensor) -> Tensor:
        torch.manual_seed(0)  # the backbone's dropout
        return dense(users, sequences, vectors, batch)[0]

    dense.train()
    assert torch.equal(loss(pooled), loss(other))
    dense.user_dropout = 0.5
    assert not torch.equal(loss(pooled), loss(other))
    dense.eval()
    assert torch.equal(loss(pooled), loss(pooled))
    assert not torch.equal(loss(pooled), loss(other))


def test_padding_adds_nothing_to_the_loss() -> None:
    dense = model("star").eval()
    pooled, sequences, vectors, batch = inputs()
    batch.weight[6:] = 0
    loss, found = dense(pooled, sequences, vectors, batch)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    expected = loss_of(found.logits[:6], batch.label[:6], reduction="sum") / ROWS
    torch.testing.assert_close(loss.detach(), expected)
