# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The criteria of filters against loops over their weights."""
import numpy as np
import pytest
import torch
import torch.nn as nn
from layer_kinds import KINDS, make_kind
from loss_toys import assert_as_before, prepared, snapshot
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import PruningError
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scores import FPGM, L1Norm, L2Norm
from mmgcp.registry import TASK_UTILS

CRITERIA = (L1Norm, L2Norm, FPGM)


def scored(criterion, model):
    units, _ = find_units(model, (3, 16, 20))
    return units, prepared(criterion, model, units, None)


def filters_by_hand(layer):
    """The weights of each output channel, as lists."""
    weight = layer.weight.detach().double().numpy()
    if not isinstance(layer, nn.ConvTranspose2d):
        return [weight[channel].ravel() for channel in range(len(weight))]
    inputs, outputs = (count // layer.groups for count in (layer.in_channels, layer.out_channels))
    return [weight[group * inputs:(group + 1) * inputs, place].ravel()
            for group in range(layer.groups) for place in range(outputs)]


def values_by_hand(kind, layer):
    filters = filters_by_hand(layer)
    if kind is L1Norm:
        return [sum(abs(value) for value in item) for item in filters]
    if kind is L2Norm:
        return [sum(value * value for value in item)**0.5 for item in filters]
    return [sum(sum((a - b)**2 for a, b in zip(first, second))**0.5 for second in filters)
            for first in filters]


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('kind', CRITERIA)
def test_scores_by_hand(kind, name):
    model = make_kind(name)
    units, scores = scored(kind(normalize='none'), model)
    compared = 0
    for unit in units:
        for item in unit.side('out'):
            if item.module not in scores[unit.name]:
                continue
            found = scores[unit.name][item.module]
            values = values_by_hand(kind, model.get_submodule(item.module))
            for channel, index in zip(item.channels.tolist(), item.unit_index.tolist()):
                assert float(found[index]) == pytest.approx(values[channel], rel=1e-5)
                compared += 1
            assert int((~found.isnan()).sum()) == len(item.unit_index)
    coupled_twice = dict(joined=8, biased=5).get(name, 0)
    assert compared == sum(unit.size for unit in units) + coupled_twice


@pytest.mark.parametrize('name, expected', [
    ('plain', {'a.conv': ['a.conv'], 'b.conv': ['b.conv']}),
    ('depthwise', {'a.conv': ['a.conv'], 'b.conv': ['b.conv']}),
    ('depthwise_transposed', {'a': ['a']}),
    ('parameter', {'a.conv': ['a.conv']}),
    ('group_norm', {'a': ['a'], 'b.conv': ['b.conv']}),
    ('biased', {'a': ['a', 'twice'], 'hidden': ['hidden']}),
    ('joined', {'c.conv': ['a.conv', 'b.conv', 'c.conv']}),
])
def test_layers_that_produce_channels(name, expected):
    """Neither normalisation nor depthwise convolutions nor parameters do."""
    _, scores = scored(L1Norm(), make_kind(name))
    assert {key: sorted(found) for key, found in scores.items()} == expected


def test_channels_that_a_layer_does_not_produce_are_nan():
    _, scores = scored(L1Norm(), make_kind('joined'))
    found = scores['c.conv']
    assert found['a.conv'].isnan().tolist() == [False] * 4 + [True] * 4
    assert found['b.conv'].isnan().tolist() == [True] * 4 + [False] * 4
    assert not found['c.conv'].isnan().any()


@pytest.mark.parametrize('kind', CRITERIA)
def test_average_and_largest_channel_are_one(kind):
    model = make_kind('grouped')
    for normalize, scale in (('mean', np.mean), ('max', np.max)):
        units, scores = scored(kind(normalize=normalize), model)
        values = values_by_hand(kind, model.parts)
        assert scores['parts']['parts'].tolist() == pytest.approx(values / scale(values), rel=1e-5)
    assert [kind().normalize, kind().fold_norm] == ['mean', False]


def test_scale_is_that_of_the_whole_layer():
    """Also where a unit has only some channels of it."""
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        a=Block(3, 2), b=Block(3, 2), c=Block(3, 4), pred=nn.Conv2d(4, 1, 1)))
    weights = torch.tensor([1., 2., 3., 6.])[:, None, None, None].expand(-1, 3, 1, 1)
    model.c.conv.weight.data = weights.clone()
    _, scores = scored(L1Norm(), model)
    assert scores['a.conv']['c.conv'].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert scores['b.conv']['c.conv'].tolist() == pytest.approx([1., 2.])


def test_layer_of_zeros_has_scores_of_zero():
    model = make_kind('plain')
    nn.init.zeros_(model.a.conv.weight)
    for kind in CRITERIA:
        for normalize in ('mean', 'max'):
            _, scores = scored(kind(normalize=normalize), model)
            assert scores['a.conv']['a.conv'].tolist() == [0.] * 8


def test_geometric_median():
    """Of points on a line the middle ones have the lowest score, not the short ones."""
    model = make_kind('plain')
    points = torch.tensor([7., 1., 2., 10., 3., 8., 9., 2.5])
    direction = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    model.a.conv.weight.data = points[:, None, None, None] * direction
    _, scores = scored(FPGM(normalize='none'), model)
    order = points[scores['a.conv']['a.conv'].argsort()]
    assert set(order[:2].tolist()) == {3., 7.}


@pytest.mark.parametrize('kind', CRITERIA)
def test_folded_norm(kind):
    """The filters are those of the convolution with the BatchNorm folded into it."""
    model = make_kind('plain')
    model.b.bn.weight.data[2] *= -1
    before = snapshot(model)
    _, scores = scored(kind(normalize='none', fold_norm=True), model)
    assert_as_before(model, before)
    for name in 'ab':
        block = getattr(model, name)
        gain = block.bn.weight.detach().abs() / (block.bn.running_var + block.bn.eps).sqrt()
        block.conv.weight.data *= gain[:, None, None, None]
        expected = values_by_hand(kind, block.conv)
        assert scores[f'{name}.conv'][f'{name}.conv'].tolist() == pytest.approx(expected, rel=1e-5)


def test_norm_behind_an_activation_is_not_folded():
    model = randomise(Toy(lambda net, x: net.pred(net.bn(net.a(x).relu_())), a=nn.Conv2d(3, 4, 1),
                          bn=nn.BatchNorm2d(4), pred=nn.Conv2d(4, 2, 1)))
    plain, folded = (scored(L1Norm(fold_norm=fold), model)[1]['a']['a'] for fold in (False, True))
    assert torch.equal(plain, folded)


def test_norms_of_levels_that_share_a_convolution():
    def run(net, x):
        return [net.pred(net.norm1(net.a(x))), net.pred(net.norm2(net.a(x[..., ::2, ::2])))]

    model = randomise(Toy(run, a=nn.Conv2d(3, 4, 1), norm1=nn.BatchNorm2d(4),
                          norm2=nn.BatchNorm2d(4, affine=False), pred=nn.Conv2d(4, 2, 1)))
    nn.init.uniform_(model.norm2.running_var, 0.5, 2)
    _, scores = scored(L1Norm(normalize='none', fold_norm=True), model)
    gains = [1 / (norm.running_var + norm.eps).sqrt() for norm in (model.norm1, model.norm2)]
    gain = (gains[0] * model.norm1.weight.detach().abs() + gains[1]) / 2
    expected = gain * model.a.weight.detach().abs().sum((1, 2, 3))
    assert scores['a']['a'].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize('name', ['L1Norm', 'L2Norm', 'FPGM'])
def test_options(name):
    options = dict(type=f'mmgcp.{name}', normalize='max', fold_norm=True)
    criterion = TASK_UTILS.build(options)
    assert (criterion.normalize, criterion.fold_norm, criterion.needs) == ('max', True, None)
    with pytest.raises(PruningError, match="normalize must be one of .*, but is 'sum'"):
        TASK_UTILS.build(dict(type=f'mmgcp.{name}', normalize='sum'))
