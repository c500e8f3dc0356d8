# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, difference, randomise

from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning import BNScale, LayerGroup, prune
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.remaining import remaining_units
from mmgcp.pruning.scored import score_units
from mmgcp.pruning.scores import L1Norm
from mmgcp.pruning.surgery import channels_off, raw_predictions

SHAPE = (3, 16, 16)
GAMMAS = dict(wide=[3., 0.1, 1., 2.], narrow=[4., 0.2, 1., 1.], same=[12., 0.2, 1., 2.])
JOINED = [13., 0.3, 3**0.5, 3.]  # roots of the sums of squares


def normed(inputs, outputs, kernel, stride=1, padding=None):
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
                         nn.BatchNorm2d(outputs))


def toy(total, stem=4, **layers):
    """A stem, a block whose outputs are what ``total`` makes of it, and a prediction."""
    def run(net, x):
        return net.pred(total(net, net.stem(x)))

    return randomise(Toy(run, stem=Block(3, stem), pred=nn.Conv2d(4, 2, 1), **layers))


def parts():
    return dict(wide=normed(4, 4, 3), narrow=normed(4, 4, 1), same=nn.BatchNorm2d(4))


def rep():
    model = toy(lambda net, x: torch.relu(net.wide(x) + net.narrow(x) + net.same(x)), **parts())
    with torch.no_grad():
        for name, values in GAMMAS.items():
            norm = model.same if name == 'same' else getattr(model, name)[1]
            norm.weight.copy_(torch.tensor(values))
    return model


def blocks(model):
    units, _ = find_units(model, SHAPE)
    return [sorted(block) for unit in units for block in unit.branches]


@pytest.mark.parametrize('total', [
    lambda net, x: torch.relu(net.wide(x) + net.narrow(x) + net.same(x)),
    lambda net, x: torch.relu(net.same(x) + (net.narrow(x) + net.wide(x))),
    lambda net, x: torch.relu(net.wide(x) + net.narrow(x) + 0 + net.same(x))])
def test_what_is_added_before_the_activation_is_one_block(total):
    assert blocks(toy(total, **parts())) == [
        ['narrow.0', 'narrow.1', 'same', 'wide.0', 'wide.1']]


def test_a_learnt_factor_of_a_branch_makes_no_difference():
    model = toy(lambda net, x: torch.relu(net.wide(x) + net.factor * net.narrow(x)), **parts())
    model.factor = nn.Parameter(torch.ones(1))
    assert blocks(model) == [['narrow.0', 'narrow.1', 'wide.0', 'wide.1']]


@pytest.mark.parametrize('total', [
    lambda net, x: torch.relu(net.wide(x)) + torch.relu(net.narrow(x)),  # not linear
    lambda net, x: x + torch.relu(net.wide(net.same(x))),
    lambda net, x: torch.relu(net.wide(x) + net.narrow(torch.relu(net.same(x)))),  # other inputs
    lambda net, x: torch.relu(net.wide(x) * net.narrow(x)),
    lambda net, x: _read_twice(net, x),
    lambda net, x: net.wide(torch.relu(net.wide(x) + net.narrow(x))) + net.same(x),
])
def test_what_is_no_block(total):
    assert blocks(toy(total, **parts())) == []


def _read_twice(net, x):
    wide = net.wide(x)
    return torch.relu(wide + net.narrow(x)) + torch.sigmoid(wide)


@pytest.mark.parametrize('narrow', [normed(4, 4, 3, padding=1, stride=2), normed(4, 4, 1, 2)])
def test_kernels_that_are_applied_at_other_places_are_no_block(narrow):
    def total(net, x):
        return torch.relu(net.wide(x)[:, :, ::2, ::2] + net.narrow(x))

    assert blocks(toy(total, wide=normed(4, 4, 3), narrow=narrow)) == []


def test_branches_with_a_stride_are_a_block():
    model = toy(lambda net, x: torch.relu(net.wide(x) + net.narrow(x)), wide=normed(4, 4, 3, 2),
                narrow=normed(4, 4, 1, 2))
    assert blocks(model) == [['narrow.0', 'narrow.1', 'wide.0', 'wide.1']]


def scored(model, criterion, groups=None):
    units, _ = find_units(model, SHAPE)
    groups = groups or [LayerGroup('all', ('*', ))]
    (found, ) = [item for item in score_units(model, units, criterion, groups, {})
                 if item.unit.branches]
    return found


def test_scores_of_a_block_are_one():
    found = scored(rep(), BNScale())
    layers = [name for name in found.scores if name != 'stem.bn']
    assert layers == ['wide.1']
    assert found.scores['wide.1'].tolist() == pytest.approx(JOINED, rel=1e-5)


def test_normalised_scores_of_filters_stay_normalised():
    model = toy(lambda net, x: torch.relu(net.wide(x) + net.narrow(x)), **parts())
    for normalize in ('mean', 'none'):
        found = scored(model, L1Norm(normalize)).scores
        sums = [layer[0].weight.detach().abs().sum((1, 2, 3)).double()
                for layer in (model.wide, model.narrow)]
        if normalize == 'mean':
            expected = sum((values / values.mean()).square() for values in sums) / 2
        else:
            expected = sum(values.square() for values in sums)
        assert found['wide.0'].tolist() == pytest.approx(expected.sqrt().tolist(), rel=1e-5)
        assert 'narrow.0' not in found


def test_branches_in_different_layer_groups_have_scores_of_their_own():
    groups = [LayerGroup('first', ('wide', 'stem')), LayerGroup('second', ('narrow', 'same'))]
    assert set(scored(rep(), BNScale(), groups).scores) >= {'wide.1', 'narrow.1', 'same'}


def test_smaller_units_keep_their_blocks():
    units, _ = find_units(rep(), SHAPE)
    (unit, ) = [unit for unit in units if unit.branches]
    (left, ) = [item for item in remaining_units(units, {unit.name: torch.tensor([1])})
                if item.name == unit.name]
    assert left.branches == unit.branches and left.size == 3


def test_a_channel_goes_by_what_all_branches_say():
    """Each channel is large in one branch, so that single votes would keep all of them."""
    model = toy(lambda net, x: torch.relu(net.wide(x) + net.narrow(x)), wide=normed(4, 4, 3),
                narrow=normed(4, 4, 1))
    with torch.no_grad():
        model.wide[1].weight.copy_(torch.tensor([1., 1., 0.6, 0.1]))
        model.narrow[1].weight.copy_(torch.tensor([0.8, 0.9, 0.5, 1.1]))
    original = copy.deepcopy(model)
    groups = [dict(name='block', modules=['wide', 'narrow'], threshold=1.2)]
    result = prune(model, groups, criterion=dict(type='mmgcp.BNScale'), compensate=False,
                   input_shape=SHAPE, round_to=1)
    removed = result.plan.removed()
    assert {name: channels.tolist() for name, channels in removed.items()} == {'wide.0': [2, 3]}
    with eval_mode(original), channels_off(original, find_units(original, SHAPE)[0], removed):
        expected = raw_predictions(original, SHAPE)
    assert difference(raw_predictions(model, SHAPE), expected) < 1e-5
