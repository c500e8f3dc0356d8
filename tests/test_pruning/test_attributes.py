# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Modules whose methods read channel counts."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
from families import family_config
from mmyolo.models.layers import CSPLayerWithTwoConv, RepVGGBlock
from pruning_samples import Block, Toy, choose, difference, randomise, run

from mmgcp.pruning import attributes, register_attribute_rule
from mmgcp.pruning.attributes import UnequalCSPLayerWithTwoConv
from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.pruning.masking import channels_off
from mmgcp.pruning.surgery import remove_channels
from mmgcp.utils.config import build_detector

SIZE = (3, 16, 16)


def rep_vgg_toy():
    return randomise(Toy(
        lambda net, x: net.pred(net.rep2(net.rep1(net.stem(x)))), stem=Block(3, 6),
        rep1=RepVGGBlock(6, 6), rep2=RepVGGBlock(6, 8), pred=nn.Conv2d(8, 2, 1)))


@pytest.mark.parametrize('deploy_first', [False, True])
def test_rep_vgg_is_deployed_before_or_after(deploy_first):
    model = rep_vgg_toy().double().eval()
    if deploy_first:
        model.rep1.switch_to_deploy()
        model.rep2.switch_to_deploy()
    sets, skipped = find_coupled_channels(model, SIZE)
    assert set(skipped) == {'pred'}
    removed = choose(sets, 1)
    assert removed
    with channels_off(model, sets, removed):
        expected = run(model, 16)
    remove_channels(model, sets, removed)
    assert difference(expected, run(model, 16)) < 1e-9
    if not deploy_first:
        model.rep1.switch_to_deploy()
        model.rep2.switch_to_deploy()
        assert difference(expected, run(model, 16)) < 1e-9
    conv = model.rep2.rbr_reparam
    assert (conv.in_channels, conv.out_channels) == (
        model.rep2.in_channels, model.rep2.out_channels) != (6, 8)


def test_yolov6_is_deployed_after_pruning():
    model = randomise(build_detector(family_config('yolov6-n'))).double().eval()
    sets, _ = find_coupled_channels(model)
    remove_channels(model, sets, choose(sets, 0))
    expected = run(model)
    for module in list(model.modules()):
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    assert not any('rbr_dense' in name for name, _ in model.named_modules())
    largest = max(float(x.abs().max()) for x in expected)
    assert difference(expected, run(model)) < 1e-9 * largest


def csp_toy():
    return randomise(Toy(
        lambda net, x: net.pred(net.csp(net.stem(x))), stem=Block(3, 6),
        csp=CSPLayerWithTwoConv(6, 8, num_blocks=2), pred=nn.Conv2d(8, 2, 1)))


@pytest.mark.parametrize('first, second, kind', [
    ([0, 2], [1], UnequalCSPLayerWithTwoConv),
    ([1], [0, 1, 3], UnequalCSPLayerWithTwoConv),
    ([3], [2], CSPLayerWithTwoConv)])
def test_halves_of_yolov8(first, second, kind):
    model = csp_toy()
    sets, skipped = find_coupled_channels(model, SIZE)
    assert set(skipped) == {'pred'}
    removed = {'csp.main_conv.conv': torch.tensor([*first, *(4 + index for index in second)])}
    with channels_off(model, sets, removed):
        expected = run(model, 16)
    remove_channels(model, sets, removed)
    assert type(model.csp) is kind and isinstance(model.csp, CSPLayerWithTwoConv)
    assert model.csp.mid_channels == 4 - len(first)
    assert difference(expected, run(model, 16)) < 1e-9
    for twin in (copy.deepcopy(model.csp), pickle.loads(pickle.dumps(model.csp))):
        assert type(twin) is kind
        assert list(twin.state_dict()) == list(model.csp.state_dict())


class Halves(nn.Module):
    """A module of a user that splits its input."""

    def __init__(self):
        super().__init__()
        self.size = 3
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.first(x[:, :self.size]) + self.second(x[:, self.size:])


def test_rule_of_a_user(monkeypatch):
    monkeypatch.setattr(attributes, 'ATTRIBUTE_RULES', dict(attributes.ATTRIBUTE_RULES))
    monkeypatch.setattr(attributes, 'SPLITTING_TYPES', set(attributes.SPLITTING_TYPES))
    monkeypatch.setattr('mmgcp.pruning.tracing.SPLITTING_TYPES', attributes.SPLITTING_TYPES)
    model = randomise(Toy(lambda net, x: net.pred(net.halves(net.stem(x))), stem=Block(3, 6),
                          halves=Halves(), pred=nn.Conv2d(4, 2, 1)))
    assert 'stem.conv' in find_coupled_channels(model, SIZE)[1]

    @register_attribute_rule(Halves, splits=True)
    def refresh(module):
        module.size = module.first.in_channels

    sets, skipped = find_coupled_channels(model, SIZE)
    assert set(skipped) == {'pred'}
    names = [item.name for item in sets if item.name == 'stem.conv']
    removed = {names[0]: torch.tensor([0, 1])}
    with channels_off(model, sets, removed):
        expected = run(model, 16)
    remove_channels(model, sets, removed)
    assert difference(expected, run(model, 16)) < 1e-9
