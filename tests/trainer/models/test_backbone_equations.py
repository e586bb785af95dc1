"""What defines each backbone: its paper's equations, and which samples its parts serve."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trainer.models.test_backbones import HIDDEN, IN, ROWS, A, D, S, make, samples
from trainer.models import BACKBONES, adaptdhm, adasparse, dcnv2, hamur, hinet, m2m, m3oe, ple
from trainer.models.aitm import Transfer
from trainer.models.deepfm import pairwise_interactions
from trainer.models.epnet import EmbeddingGate
from trainer.models.layers import (
    ITEM,
    SCENARIO,
    USER,
    OwnExperts,
    ParallelLinear,
    Towers,
    block_width,
)
from trainer.models.ppnet import GatedTowers


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def changed(net: nn.Module, change: Callable[[], object]) -> Tensor:
    """Which samples [B, tasks] a change of parameters moves."""
    batch = samples()
    for module in net.modules():
        if isinstance(module, Towers):  # no unit of theirs hides what happens before them
            nn.init.constant_(module.hidden.layers[0].bias, 5.0)
    before = net(*batch)
    with torch.no_grad():
        change()
    return net(*batch) != before


def test_mmoe_is_the_gates_mixture_of_all_experts() -> None:
    net, (x, scenario) = make("mmoe", tasks=2), samples()
    weights = net.gate_scores(x, scenario).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(ROWS, 2))
    experts = net.experts(x)
    mixed = sum(weights[:, :, e, None] * experts[:, None, e] for e in range(4))
    torch.testing.assert_close(net(x, scenario), net.towers(mixed, scenario))


@pytest.mark.parametrize("name", ["ple", "sar_net"])
def test_shared_experts_serve_all_and_own_ones_their_scenario(name: str) -> None:
    net, (_, scenario) = make(name, tasks=2), samples()
    level = net.levels[0] if name == "ple" else net
    own, shared = level.own.layers[0], level.shared.layers[0]
    per_scenario = len(own.bias) // S
    moved = changed(net, lambda: own.bias[:per_scenario].add_(1))
    assert torch.equal(moved.any(1), scenario == 0)
    assert changed(net, lambda: shared.bias.add_(1)).any(1).all()


def test_ple_tasks_share_experts_of_no_other_task_on_the_last_level() -> None:
    net = make("ple", tasks=2)
    last = net.levels[-1].own.layers[0]
    assert ple.OWN_EXPERTS == 1
    moved = changed(net, lambda: last.bias[1::2].add_(1))  # the second task's, of every scenario
    assert not moved[:, 0].any()
    assert moved[:, 1].all()
    assert net.levels[-1].shared_gate is None
    assert net.levels[0].shared_gate is not None


def test_ple_level_mixes_own_and_shared_experts() -> None:
    net, (x, scenario) = make("ple", tasks=2), samples()
    level, states, shared = net.levels[0], torch.randn(ROWS, 2, IN), x
    own, common = level.own(states, scenario), level.shared(shared)
    weights = level.gate(states, scenario).softmax(-1)
    shared_weights = level.shared_gate(shared).softmax(-1)
    found, found_shared = level(states, shared, scenario)
    for task in range(2):
        pool = torch.cat([own[:, task : task + 1], common], dim=1)
        torch.testing.assert_close(found[:, task], (weights[:, task, :, None] * pool).sum(1))
    pool = torch.cat([own, common], dim=1)
    torch.testing.assert_close(found_shared, (shared_weights[..., None] * pool).sum(1))


def test_aitm_transfers_forward_and_never_back() -> None:
    net = make("aitm", tasks=3)
    second = changed(net, lambda: net.bottoms.layers[-1].bias[1].add_(1))
    assert second.any(0).tolist() == [False, True, True]
    net(*samples())[:, 2].sum().backward()  # a later task's loss trains the earlier ones' bottoms
    assert (net.bottoms.layers[0].weight.grad.view(3, -1).abs().amax(1) > 0).all()


def test_aitm_with_one_task_is_a_shared_bottom() -> None:
    net, plain, (x, scenario) = make("aitm"), make("shared_bottom"), samples()
    assert len(net.transfers) == 0
    with torch.no_grad():  # both hold the same layers in the same order
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            mine.copy_(theirs.view(mine.shape))
    torch.testing.assert_close(net(x, scenario), plain(x, scenario))


def test_aitm_attention_is_the_papers() -> None:
    transfer, earlier, own = Transfer(4), torch.randn(4), torch.randn(4)
    message = F.relu(transfer.message[0](earlier))
    pair = [message, own]
    scores = [(transfer.key(u) @ transfer.query(u)).item() / math.sqrt(4) for u in pair]
    total = sum(math.exp(score) for score in scores)
    expected = sum(
        math.exp(a) / total * transfer.value(u) for a, u in zip(scores, pair, strict=True)
    )
    torch.testing.assert_close(transfer(earlier[None], own[None])[0], expected)


def test_sar_net_transforms_the_input_by_scenario() -> None:
    net, (x, scenario) = make("sar_net"), samples()
    nn.init.normal_(net.transform.scale)
    nn.init.normal_(net.transform.shift)
    for row, s in enumerate(scenario.tolist()):
        expected = x[row] * net.transform.scale[s] + net.transform.shift[s]
        torch.testing.assert_close(net.transform(x, scenario)[row], expected)


def test_sar_net_gates_what_it_transforms_and_normalises() -> None:
    net, (x, scenario) = make("sar_net", tasks=2), samples()
    nn.init.normal_(net.transform.scale)
    nn.init.normal_(net.transform.shift)
    h = F.layer_norm(x * net.transform.scale[scenario] + net.transform.shift[scenario], [IN])
    experts = torch.cat([net.shared(h), net.own(h, scenario)], dim=1)
    weights = F.linear(h, net.gate.weight, net.gate.bias).view(ROWS, 2, -1).softmax(-1)
    expected = net.towers(weights @ experts, torch.zeros_like(scenario))
    torch.testing.assert_close(net(x, scenario), expected)


def test_star_normalises_by_scenario_and_adds_an_auxiliary_network() -> None:
    net, (x, scenario) = make("star", tasks=2), samples()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    h = F.layer_norm(x, [IN], net.norm.weight, net.norm.bias)
    h = h * net.scale[scenario] + net.shift[scenario]
    for layer in net.layers:
        h = layer(h, scenario).relu()
    auxiliary = x
    for layer in net.auxiliary.modules():
        if isinstance(layer, nn.Linear):
            last = layer.out_features == 2
            auxiliary = layer(auxiliary) if last else layer(auxiliary).relu()
    torch.testing.assert_close(net(x, scenario), net.out(h, scenario) + auxiliary)


def test_m2m_meta_unit_is_a_layer_that_the_scenario_generates() -> None:
    unit = m2m.MetaUnit(5)
    nn.init.normal_(unit.bias)
    h, s = torch.randn(6, 5), torch.randn(2, m2m.SCENARIO_WIDTH)
    found = unit(h, s)
    for row in range(6):
        g = torch.cat([s[row // 3], torch.ones(1)])
        weight, bias = torch.einsum("r,roi->oi", g, unit.weight), g @ unit.bias
        torch.testing.assert_close(found[row], weight @ h[row] + bias)


def test_m2m_attends_by_the_meta_unit_and_adds_what_it_reads() -> None:
    net, (x, scenario) = make("m2m", tasks=2), samples()
    s, experts = net.scenario(x[:, SCENARIO * D :][:, :D]), net.experts(x)
    for task in range(2):
        scores = [
            net.score(
                F.leaky_relu(net.attention(torch.cat([e, net.tasks[task].expand_as(e)], 1), s))
            )
            for e in experts.unbind(1)
        ]
        mixed = (torch.stack(scores, 1).softmax(1) * experts).sum(1)
        h = F.leaky_relu(net.tower(mixed, s) + mixed)
        expected = h @ net.out.weight[task, 0] + net.out.bias[task, 0]
        torch.testing.assert_close(net(x, scenario)[:, task], expected)


def test_ada_sparse_factors_prune_or_weigh() -> None:
    pruner = adasparse.Pruner(D, 200)
    nn.init.normal_(pruner.linear.weight)
    factors = pruner(torch.randn(50, D), torch.randn(50, 200))
    pruned = factors == 0
    assert 0.1 < pruned.float().mean() < 0.9
    kept = factors[~pruned]
    assert kept.min() > adasparse.THRESHOLD
    assert kept.max() <= adasparse.SCALE
    nn.init.zeros_(pruner.linear.weight)
    assert torch.equal(pruner(torch.randn(2, D), torch.randn(2, 200)), torch.ones(2, 200))


def test_ada_sparse_prunes_the_input_and_every_hidden_layer() -> None:
    net, (x, scenario) = make("ada_sparse"), samples()
    e = x[:, SCENARIO * D :][:, :D]
    h = x * net.pruners[0](e, x)
    for layer, pruner in zip(net.layers, list(net.pruners)[1:], strict=True):
        h = layer(h).relu()
        h = h * pruner(e, h)
    torch.testing.assert_close(net(x, scenario), net.out(h))


def test_adapt_dhm_routes_each_sample_to_one_cluster() -> None:
    net, (x, scenario) = make("adapt_dhm"), samples()
    routes = net.route(x)
    torch.testing.assert_close(routes.sum(1), torch.ones(ROWS))
    cluster = routes.argmax(1)
    assert len(cluster.unique()) > 1
    moved = changed(net, lambda: net.layers[0].own_bias[0].add_(1))
    assert torch.equal(moved[:, 0], cluster == 0)
    h = x
    for layer in net.layers:
        weight = layer.shared.weight * layer.own_weight[cluster]
        bias = layer.shared.bias + layer.own_bias[cluster]
        h = (torch.einsum("bi,boi->bo", h, weight) + bias).relu()
    torch.testing.assert_close(net(x, scenario), net.out(h, cluster))


def test_adapt_dhm_learns_its_centres_and_leaves_the_input_alone() -> None:
    net, (x, scenario) = make("adapt_dhm"), samples()
    x.requires_grad_()
    assert torch.autograd.grad(net.route(x).square().sum(), x, allow_unused=True)[0] is None
    net(x, scenario).sum().backward()
    assert (net.centres.grad.abs().amax(1) > 0).any()
    assert len(net.centres) == adaptdhm.CLUSTERS


def test_embedding_gate_reaches_only_the_scenario() -> None:
    gate, (x, _) = EmbeddingGate(IN), samples()
    x.requires_grad_()
    factors = gate.factors(x)
    assert factors.min() > 0
    assert factors.max() < 2
    factors.sum().backward()
    of_block = x.grad.abs().view(ROWS, 6, D).amax((0, 2))
    assert (of_block > 0).tolist() == [which == SCENARIO for which in range(6)]
    torch.testing.assert_close(gate(x), x * factors)


def test_epnet_is_the_gated_input_through_shared_layers() -> None:
    net, (x, scenario) = make("epnet", tasks=2), samples()
    gated = x * net.embedding_gate.factors(x)
    torch.testing.assert_close(net(x, scenario), net.out(net.layers(gated)))
    assert not torch.allclose(net.layers(gated), net.layers(x), atol=1e-3)


def test_parameter_gates_reach_the_prior_and_not_the_input() -> None:
    towers, (x, _) = GatedTowers(3, IN, HIDDEN, 0.0, 2), samples()
    nn.init.zeros_(towers.layers[0].weight)  # then x can act through the gates alone
    nn.init.ones_(towers.layers[0].bias)
    prior = torch.randn(ROWS, 3, requires_grad=True)
    x.requires_grad_()
    towers(prior, x).sum().backward()
    assert x.grad is None or x.grad.abs().max() == 0
    assert prior.grad.abs().max() > 0


def test_ppnet_weighs_hidden_units_by_the_gate() -> None:
    net, (x, scenario) = make("ppnet", tasks=2), samples()
    told, h = torch.cat([x[:, :D], x[:, D : 2 * D], x], 1), x[:, None].expand(-1, 2, -1)
    for layer, gate in zip(net.towers.layers, net.towers.gates, strict=True):
        h = torch.einsum("bti,toi->bto", h, layer.weight) + layer.bias
        h = h.relu() * 2 * gate.layers(told).sigmoid().view(h.shape)
    expected = torch.einsum("bti,toi->bto", h, net.towers.out.weight) + net.towers.out.bias
    torch.testing.assert_close(net(x, scenario), expected[..., 0])


def test_pepnet_gates_move_user_item_and_scenario_alone() -> None:
    net, (x, scenario) = make("pepnet"), samples()
    nn.init.zeros_(net.towers.layers[0].weight)
    nn.init.ones_(net.towers.layers[0].bias)
    x.requires_grad_()
    net(x, scenario).sum().backward()
    of_block = x.grad.abs().view(ROWS, 6, D).amax((0, 2))
    assert (of_block > 0).tolist() == [which in (USER, ITEM) for which in range(6)]
    # With ordinary towers the scenario's embedding learns through the gate of the embeddings.
    net = make("pepnet")
    (factors,) = [net.embedding_gate.factors(x)]
    assert torch.autograd.grad(factors.sum(), x)[0].view(ROWS, 6, D)[:, SCENARIO].abs().max() > 0


def test_pepnet_is_epnet_before_gated_towers() -> None:
    net, (x, scenario) = make("pepnet"), samples()
    expected = net.towers(x[:, : 2 * D], x * net.embedding_gate.factors(x))
    torch.testing.assert_close(net(x, scenario), expected)
    assert not torch.allclose(net(x, scenario), net.towers(x[:, : 2 * D], x))


def test_hamur_cell_has_a_shortcut_and_the_scenarios_norm() -> None:
    cell, (_, scenario) = hamur.AdapterCell(S, 8), samples()
    nn.init.normal_(cell.affine.scale)
    nn.init.normal_(cell.affine.shift)
    h, instance = torch.randn(ROWS, 8), torch.randn(ROWS, hamur.RANK, hamur.RANK)
    y = cell.up(cell.down(h, instance).sigmoid(), instance)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = h + y * cell.affine.scale[scenario] + cell.affine.shift[scenario]
    torch.testing.assert_close(cell(h, instance, scenario), expected)


def test_hamur_generated_layer_is_low_rank_and_differs_by_instance() -> None:
    layer, k = hamur.LowRankLinear(5, 4), hamur.RANK
    instance, h = torch.randn(2, k, k), torch.randn(5)
    found = layer(torch.stack([h, h]), instance)
    assert not torch.allclose(found[0], found[1])
    for row in range(2):
        weight = layer.u @ instance[row] @ layer.v
        torch.testing.assert_close(found[row], h @ weight + layer.bias)


def test_hamur_shares_the_hyper_network_alone() -> None:
    net, (x, scenario) = make("hamur"), samples()
    moved = changed(net, lambda: net.layers[0].bias[0].add_(1))
    assert torch.equal(moved[:, 0], scenario == 0)
    assert changed(net, lambda: net.hyper[1].bias.add_(torch.randn(64))).all()
    cell, h = net.cells[0], torch.randn(1, A).expand(ROWS, -1)
    out = cell(h, net.hyper(x).view(-1, hamur.RANK, hamur.RANK), scenario)
    assert len(out.unique(dim=0)) == ROWS  # one hidden state, as many outcomes as instances


def test_hamur_is_a_relu_network_per_scenario_with_cells_behind_its_last_layers() -> None:
    net, (x, scenario) = BACKBONES["hamur"](IN, S, [9, 8, 7], 0.0, 2), samples()
    instance, h = net.hyper(x).view(-1, hamur.RANK, hamur.RANK), x
    for number, layer in enumerate(net.layers):
        h = torch.stack([layer.weight[s] @ one for s, one in zip(scenario, h, strict=True)])
        h = (h + layer.bias[scenario]).relu()
        if number:
            h = net.cells[number - 1](h, instance, scenario)
    torch.testing.assert_close(net(x, scenario), net.out(h, scenario))


def test_hamur_learns_of_the_input_through_the_hyper_network_too() -> None:
    net, (x, scenario) = make("hamur"), samples()
    nn.init.zeros_(net.layers[0].weight)  # then there is no other way
    nn.init.ones_(net.layers[0].bias)
    x.requires_grad_()
    net(x, scenario).sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()


def test_m3oe_balances_own_with_the_mean_of_the_others() -> None:
    balance, experts = m3oe.Balance(), torch.randn(3, 4, 2)
    nn.init.constant_(balance.logit, 1.0)
    share = torch.tensor(1.0).sigmoid()
    for own in range(4):
        others = experts[:, [j for j in range(4) if j != own]].mean(1)
        expected = share * experts[:, own] + (1 - share) * others
        found = balance(experts, experts[:, own : own + 1])[:, 0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("group", ["shared", "of_scenarios", "of_tasks"])
def test_m3oe_listens_to_three_groups_of_experts(group: str) -> None:
    net = make("m3oe", tasks=2)
    experts = getattr(net, group).layers[-1]
    assert changed(net, lambda: experts.bias.add_(1)).all()


def test_m3oe_fuses_experts_on_a_star_layer_with_a_shortcut() -> None:
    net, (x, scenario) = make("m3oe", tasks=2), samples()
    nn.init.normal_(net.fusion)
    e = net.after_star(net.star(x, scenario)) + net.shortcut(x)
    weights = net.gate(e, scenario).view(ROWS, 2, 4).softmax(-1)
    of_scenarios, of_tasks = net.of_scenarios(e), net.of_tasks(e)
    balanced = net.scenario_balance(of_scenarios, of_scenarios)[torch.arange(ROWS), scenario]
    fused = (
        weights @ net.shared(e)
        + net.fusion[0].sigmoid() * balanced[:, None]
        + net.fusion[1].sigmoid() * net.task_balance(of_tasks, of_tasks)
    )
    torch.testing.assert_close(net(x, scenario), net.towers(fused, scenario))


def test_m3oe_gates_send_no_gradient_to_what_they_read() -> None:
    net, (x, scenario) = make("m3oe"), samples()
    for experts in (net.shared, net.of_scenarios, net.of_tasks):
        nn.init.zeros_(experts.layers[0].weight)  # then e can act through the gates alone
        nn.init.normal_(experts.layers[0].bias, mean=1.0)
    x.requires_grad_()
    net(x, scenario).sum().backward()
    assert x.grad.abs().max() == 0
    assert net.gate.weight.grad.abs().max() > 0


def test_hinet_attends_to_the_other_scenarios() -> None:
    net, (x, scenario) = make("hinet"), samples()
    weights = net.attend(x, scenario)
    torch.testing.assert_close(weights.sum(1), torch.ones(ROWS))
    assert weights[torch.arange(ROWS), scenario].abs().max() == 0
    assert make("hinet", scenarios=1).attend(x, torch.zeros_like(scenario)).abs().max() == 0


def test_hinet_mixes_each_tasks_experts_with_the_shared_ones() -> None:
    net, (x, scenario) = make("hinet", tasks=2), samples()
    own = F.one_hot(scenario, S).float()
    others = net.attend(x, scenario)
    extracted = [net.of_scenarios(x, choice[:, None])[:, 0] for choice in (own, others)]
    h = torch.cat([net.shared(x, torch.ones(ROWS, 1, 1))[:, 0], *extracted], dim=1)
    first, second, common = net.of_tasks(h).view(ROWS, 3, hinet.TASK_EXPERTS, -1).unbind(1)
    weights = net.gate(h).view(ROWS, 2, -1).softmax(-1)
    mixed = [
        (weights[:, [task]] @ torch.cat([experts, common], dim=1))[:, 0]
        for task, experts in enumerate((first, second))
    ]
    torch.testing.assert_close(net(x, scenario), net.towers(torch.stack(mixed, dim=1), scenario))


def test_hinet_sub_experts_are_mixed_by_their_groups_gate() -> None:
    sub, (x, _) = hinet.SubExperts(3, IN, 5, 0.0), samples()
    choice = torch.rand(ROWS, 2, 3)
    gates, experts = sub.gate(x).view(ROWS, 3, 2).softmax(-1), sub.experts(x).view(ROWS, 3, 2, 5)
    groups = (gates[..., None] * experts).sum(2)
    torch.testing.assert_close(sub(x, choice), choice @ groups)


def test_cross_layer_is_the_formula() -> None:
    layer, x0, x = dcnv2.CrossLayer(IN), torch.randn(IN), torch.randn(IN)
    expected = x0 * (layer.linear.weight @ x + layer.linear.bias) + x
    torch.testing.assert_close(layer(x0, x), expected)


def test_cross_network_crosses_with_the_input_at_every_layer() -> None:
    net, (x, scenario) = make("dcnv2"), samples()
    crossed = x
    for layer in net.cross:
        crossed = x * F.linear(crossed, layer.linear.weight, layer.linear.bias) + crossed
    expected = net.out(torch.cat([crossed, net.deep(x)], dim=1))
    torch.testing.assert_close(net(x, scenario), expected)
    assert len(net.cross) == dcnv2.CROSS_LAYERS


def test_deepfm_pairs_are_all_pairs() -> None:
    net, (x, scenario) = make("deepfm"), samples()
    fields = x.view(ROWS, 6, D)[:, :4]  # user, item, scenario, history
    brute = sum(
        (fields[:, a] * fields[:, b]).sum(1) for a, b in itertools.combinations(range(4), 2)
    )
    torch.testing.assert_close(pairwise_interactions(fields)[:, 0], brute)
    rest = net.first_order(x) + net.out(net.deep(x))
    torch.testing.assert_close(net(x, scenario) - rest, brute[:, None])


@pytest.mark.parametrize("width", [1, 5])
def test_parallel_and_own_layers_equal_one_layer_each(width: int) -> None:
    x, scenario = samples()
    layer = ParallelLinear(3, IN, width)
    nn.init.normal_(layer.bias)
    for e in range(3):
        expected = F.linear(x, layer.weight[e], layer.bias[e])
        torch.testing.assert_close(layer(x)[:, e], expected)
        each = torch.stack([x, x * 2, x * 3], 1)
        expected = F.linear(x * (e + 1), layer.weight[e], layer.bias[e])
        torch.testing.assert_close(layer(each)[:, e], expected)
    own = OwnExperts(S, 2, IN, [5], 0.0)
    for row, s in enumerate(scenario.tolist()):
        for e in range(2):
            weight, bias = own.layers[0].weight[2 * s + e], own.layers[0].bias[2 * s + e]
            expected = F.linear(x[row], weight, bias).relu()
            torch.testing.assert_close(own(x, scenario)[row, e], expected)
    assert block_width(IN) == D
