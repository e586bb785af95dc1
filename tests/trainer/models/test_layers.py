"""Layers that several backbones share, alone; what they are in a backbone is in test_backbone_equations."""

import pytest
import torch

from trainer.models.layers import Dropout, mix


@pytest.mark.parametrize("shape", [(1_000, 4, 64), (999,), (7, 0)])
def test_dropout_zeroes_its_share_and_scales_the_rest(shape: tuple[int, ...]) -> None:
    layer, x = Dropout(0.3), torch.ones(shape, requires_grad=True)
    assert layer.eval()(x) is x
    torch.manual_seed(0)
    y = layer.train()(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7] if x.numel() else [], rel=1e-4)
    if x.numel():
        # Five standard deviations of a share, over all and, where there are many, in every place of four.
        for part in (y.flatten(), *y.flatten()[: len(y) // 4 * 4].view(-1, 4).t()):
            if len(part):
                assert abs((part == 0).float().mean() - 0.3) < 5 * (0.21 / len(part)) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y) or not x.numel()


def test_dropout_keeps_the_type_and_takes_any_layout() -> None:
    x = torch.ones(8, 6, 4, dtype=torch.bfloat16).transpose(0, 2)
    y = Dropout(0.5).train()(x)
    assert y.dtype == torch.bfloat16
    assert set(y.flatten().tolist()) == {0.0, 2.0}


def test_one_mixture_is_what_it_is_among_several() -> None:
    experts, scores = torch.randn(9, 3, 5), torch.randn(9, 2, 3)
    both = mix(experts, scores)
    for task in range(2):
        torch.testing.assert_close(mix(experts, scores[:, task : task + 1]), both[:, [task]])


def test_all_but_one_share_that_rounds_to_all_still_drops() -> None:
    """A configuration may ask for any share below 1; 16 bits do not tell the last ones apart from 1."""
    y = Dropout(0.999995).train()(torch.ones(100_000))
    assert y.isfinite().all()
    assert (y != 0).sum() < 20
