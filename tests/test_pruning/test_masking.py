# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from layer_kinds import KINDS, make_kind, some_of_each
from mmyolo.models.layers import CSPLayerWithTwoConv, RepVGGBlock
from pruning_samples import Block, Toy, choose, difference, randomise, residual_toy, run
from zeroing import zero

from mmgcp.errors import PruningError
from mmgcp.nn.temporarily import Snapshot
from mmgcp.pruning.attributes import UnequalCSPLayerWithTwoConv
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import (
    channels_off,
    check_same_predictions,
    raw_predictions,
    remove_channels,
)

SIZE = (3, 16, 16)
NAN, INF = float('nan'), float('inf')


def test_channels_off_is_as_without_their_weights():
    model = residual_toy()
    units, _ = find_units(model, SIZE)
    removed = {'stem.conv': torch.tensor([1, 5]), 'a1.conv': torch.tensor([0])}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for consumer in (expected.a1.conv, expected.a2.conv, expected.pred):
            consumer.weight[:, [1, 5]] = 0
        expected.b1.conv.weight[:, 0] = 0
    before = run(model, 16)
    with channels_off(model, units, removed):
        assert difference(run(model, 16), run(expected, 16)) < 1e-12
    assert difference(run(model, 16), before) == 0
    assert difference(run(expected, 16), before) > 0.01


def test_snapshot_takes_everything_back():
    model = residual_toy()
    units, _ = find_units(model, SIZE)
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(
        keep_vars=True).items()}
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.a1.bn.running_mean += 1
        model.pred.bias += 1
    remove_channels(model, units, choose(units, 3))
    model.stem.__class__ = type('Other', (Block, ), {})
    assert model.stem.conv.out_channels < 8
    snapshot.restore()
    assert type(model.stem) is Block and model.stem.conv.out_channels == 8
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is tensors[name][0] and torch.equal(value, tensors[name][1])


def test_different_predictions_are_refused():
    check_same_predictions([torch.ones(3)], [torch.ones(3) + 1e-5])
    for found in (torch.ones(3) + 0.1, torch.ones(4), torch.full((3, ), float('nan'))):
        with pytest.raises(PruningError, match='register_attribute_rule'):
            check_same_predictions([torch.ones(3)], [found])


def test_linear_layers_have_their_channels_last():
    model = randomise(Toy(
        lambda net, x: net.pred(net.f(net.a(x).flatten(2).transpose(1, 2))), a=Block(3, 4),
        f=nn.Linear(4, 6), pred=nn.Linear(6, 2)))
    units, _ = find_units(model, SIZE)
    removed = {'f': torch.tensor([0, 4])}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.pred.weight[:, [0, 4]] = 0
    with channels_off(model, units, removed):
        assert difference(run(model, 16), run(expected, 16)) < 1e-12


class Shifted(nn.Module):
    """Adds a parameter, also to channels of zeros."""

    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.rand(1, width, 1, 1))

    def forward(self, x):
        return x + self.shift


def all_kinds():
    return randomise(Toy(
        lambda net, x: net.pred(F.relu(net.up(net.norm(net.grouped(net.own(net.depth(net.a(
            x)))))))), a=Block(3, 6), depth=nn.Conv2d(6, 6, 3, groups=6), own=Shifted(6),
        grouped=nn.Conv2d(6, 4, 1, groups=2), norm=nn.BatchNorm2d(4),
        up=nn.ConvTranspose2d(4, 4, 2, 2), pred=nn.Conv2d(4, 2, 1)))


def test_channels_off_in_layers_of_all_kinds():
    model = all_kinds()
    units, skipped = find_units(model, SIZE)
    assert list(skipped) == ['pred']
    removed = {'a.conv': [1, 5], 'grouped': [0, 2], 'up': [3]}
    expected = run(zero(model, {
        **{(name, 'out'): [1, 5] for name in ('a.conv', 'a.bn', 'depth', 'own.shift')},
        ('grouped', 'in'): [1, 5], ('grouped', 'out'): [0, 2], ('norm', 'out'): [0, 2],
        ('up', 'in'): [0, 2], ('up', 'out'): [3], ('pred', 'in'): [3]}), 16)
    before = run(model, 16)
    with channels_off(model, units, {name: torch.tensor(channels)
                                    for name, channels in removed.items()}):
        found = run(model, 16)
    assert difference(found, expected) < 1e-12 and difference(found, before) > 1e-3
    assert difference(run(model, 16), before) == 0.


@pytest.mark.parametrize('kind', KINDS)
def test_channels_off_is_what_pruning_leads_to(kind):
    model = make_kind(kind)
    units, _ = find_units(model, SIZE)
    removed = some_of_each(units, 0)
    with channels_off(model, units, removed):
        expected = run(model, 16)
    remove_channels(model, units, removed)
    assert difference(run(model, 16), expected) < 1e-9


def test_channels_come_back_after_an_error():
    model = residual_toy()
    units, _ = find_units(model, SIZE)
    before = run(model, 16)
    with pytest.raises(KeyError), channels_off(model, units, {'stem.conv': torch.tensor([1])}):
        raise KeyError
    assert difference(run(model, 16), before) == 0.
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


def attributes_of(model):
    """Everything that modules know of themselves, but for their modules and tensors."""
    return {name: (type(module), {key: value for key, value in vars(module).items()
                                  if key not in ('_parameters', '_buffers', '_modules')})
            for name, module in model.named_modules()}


def test_snapshot_of_layers_of_all_kinds():
    model = randomise(Toy(
        lambda net, x: net.pred(net.rep(net.csp(net.norm(net.kinds(x))))), kinds=nn.Sequential(
            Block(3, 6), nn.Conv2d(6, 6, 3, groups=6), Shifted(6), nn.Conv2d(6, 4, 1, groups=2),
            nn.ConvTranspose2d(4, 8, 2, 2)),
        norm=nn.GroupNorm(4, 8), csp=CSPLayerWithTwoConv(8, 6), rep=RepVGGBlock(6, 6),
        pred=nn.Conv2d(6, 2, 1)))
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    model.csp.main_conv.bn.num_batches_tracked += 3
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(
        keep_vars=True).items()}
    attributes, before = attributes_of(model), run(model, 16)
    units, skipped = find_units(model, SIZE)
    assert list(skipped) == ['pred']
    snapshot = Snapshot(model)
    removed = some_of_each(units, 2)
    removed['csp.main_conv.conv'] = torch.tensor([0, 1, 4])
    assert set(removed) == {unit.name for unit in units}
    with torch.no_grad():
        model.rep.rbr_dense.bn.running_mean += 1
        model.rep.rbr_dense.bn.bias += 1
        model.kinds[4].bias.zero_()
        model.kinds[4].bias.requires_grad_(True)
    model.train()
    remove_channels(model, units, removed)
    model.rep.rbr_dense.bn.num_batches_tracked += 1
    assert type(model.csp) is UnequalCSPLayerWithTwoConv
    assert model.rep.in_channels < 6 and model.kinds[1].groups < 6 and model.norm.num_groups < 4
    snapshot.restore()
    assert attributes_of(model) == attributes
    state = model.state_dict(keep_vars=True)
    assert list(state) == list(tensors)
    for name, value in state.items():
        assert value is tensors[name][0] and torch.equal(value, tensors[name][1]), name
    assert not model.norm.weight.requires_grad
    assert difference(run(model, 16), before) == 0.


def test_raw_predictions_are_of_the_eval_mode():
    model = Toy(lambda net, x: [net.pred(net.drop(x)), {'x': x}], pred=nn.Conv2d(3, 2, 1),
                drop=nn.Dropout(0.9)).train()
    first, second = raw_predictions(model, SIZE), raw_predictions(model, SIZE)
    assert [x.shape for x in first] == [(1, 2, 16, 16), (1, 3, 16, 16)]
    assert difference(first, second) == 0. and not first[0].requires_grad
    assert model.training and model.drop.training


@pytest.mark.parametrize('expected, found, same', [
    ([0., 0.], [0., 9e-4], True), ([0., 0.], [0., 1.1e-3], False),
    ([999., 0.], [999., 0.9], True), ([999., 0.], [999., 1.1], False),
    ([NAN, 1.], [NAN, 1.], True), ([NAN, 1.], [1., 1.], False), ([1., 1.], [NAN, 1.], False),
    ([INF, 1.], [INF, 1.], True), ([INF, 1.], [INF, 1.1], False), ([-INF, 1.], [INF, 1.], False),
    ([], [], True)])
def test_same_predictions(expected, found, same):
    def check():
        check_same_predictions([torch.zeros(1), torch.tensor(expected)],
                               [torch.zeros(1), torch.tensor(found)])

    if same:
        return check()
    with pytest.raises(PruningError, match='does not compute what the original does'):
        check()


@pytest.mark.parametrize('found', [[], [torch.ones(1)], [torch.ones(1)] * 3,
                                   [torch.ones(1), torch.ones(1, 1)]])
def test_predictions_of_other_numbers_or_shapes(found):
    with pytest.raises(PruningError, match='does not compute'):
        check_same_predictions([torch.ones(1)] * 2, found)
