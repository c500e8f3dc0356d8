# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.

import pytest
import torch
from families import family_config
from torch import nn

from mmgcp.sparsity import select_scale_factors
from mmgcp.utils.config import build_detector

SHAPE = (1, 16, 16)


class HalfPrunable(nn.Module):
    """The norm has the channels of a, which stay because of the grouped layer, and those of b."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 2, 1)
        self.b = nn.Conv2d(1, 3, 1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(5, 2, 1)
        self.grouped = nn.Conv2d(2, 4, 1, groups=2)
        self.other_head = nn.Conv2d(4, 2, 1)

    def forward(self, inputs, mode='tensor'):
        torch.rand(1)  # as stochastic depth does
        a = self.a(inputs)
        x = self.drop(self.norm(torch.cat([a, self.b(inputs)], 1)))
        return self.head(x), self.other_head(self.grouped(a))


def test_half_of_a_layer_is_prunable():
    model = HalfPrunable()
    model.norm.weight.data = torch.arange(5.)
    channels = select_scale_factors(model, 'prunable', input_shape=SHAPE).trained()
    assert channels.values().tolist() == [2., 3., 4.]
    assert select_scale_factors(model).trained().values().tolist() == [0., 1., 2., 3., 4.]


def test_looking_leaves_no_trace():
    model = HalfPrunable()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    select_scale_factors(model, 'prunable', coupled=True, groups='auto', input_shape=SHAPE)
    assert torch.equal(torch.rand(1), drawn)
    assert [name for name, module in model.named_modules() if not module.training] == ['norm']
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['a.weight']
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize('family', ['yolov5-n', 'yolov8-n', 'ppyoloe-s'])
def test_families(family):
    model = build_detector(family_config(family))
    norms = [name for name, module in model.named_modules()
             if isinstance(module, nn.BatchNorm2d)]
    found = select_scale_factors(model, 'prunable', coupled=True, groups='auto')
    assert {layer.name for layer in found.layers} <= set(norms)
    assert len(found.layers) > 0.9 * len(norms)
    groups = {layer.name: layer.group for layer in found.layers}
    assert {'backbone-16', 'top-down-16', 'bottom-up-32'} <= set(groups.values())
    channels = found.trained()
    values = channels.values()
    # Shortcuts couple some of the channels, and not all
    alone = channels.magnitudes(values + torch.linspace(0, 1, len(values))) == (
        values + torch.linspace(0, 1, len(values)))
    assert 0.3 < alone.float().mean() < 0.98
