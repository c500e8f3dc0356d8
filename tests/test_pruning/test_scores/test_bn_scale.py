# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from layer_kinds import make_kind
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import PruningError
from mmgcp.pruning import BNScale
from mmgcp.pruning.graph import find_units
from mmgcp.registry import TASK_UTILS


def scored(model, **options):
    units, _ = find_units(model, (3, 8, 8))
    return {unit.name: BNScale(**options)(model, unit) for unit in units}


def chain(*names):
    def run(net, x):
        for name in names:
            x = getattr(net, name)(x)
        return x
    return run


def test_absolute_scales_of_coupled_layers():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x) + net.b(x)),
                          a=Block(3, 3), b=Block(3, 3), pred=nn.Conv2d(3, 1, 1)))
    model.a.bn.weight.data = torch.tensor([0.5, -2., 0.])
    model.b.bn.weight.data = torch.tensor([-1., 0.25, 3.])
    scores = scored(model)['a.conv']
    assert {layer: values.tolist() for layer, values in scores.items()} == {
        'a.bn': [0.5, 2., 0.], 'b.bn': [1., 0.25, 3.]}
    assert not any(values.requires_grad for values in scores.values())


def test_part_of_a_layer():
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        a=Block(3, 2), b=Block(3, 2), c=Block(3, 4), pred=nn.Conv2d(4, 1, 1)))
    model.c.bn.weight.data = torch.tensor([1., -2., 3., -4.])
    scores = scored(model)
    assert scores['a.conv']['c.bn'].tolist() == [1., 2.]
    assert scores['b.conv']['c.bn'].tolist() == [3., 4.]


def test_channels_that_a_layer_does_not_have_are_nan():
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        c=Block(3, 4), a=Block(3, 2), b=Block(3, 2), pred=nn.Conv2d(4, 1, 1)))
    model.b.bn.weight.data = torch.tensor([-5., 6.])
    values = scored(model)['c.conv']['b.bn']
    assert values[:2].isnan().all() and values[2:].tolist() == [5., 6.]


def test_scales_of_group_norms():
    model = make_kind('group_norm')
    model.norm.weight.data = torch.arange(-6., 6.)
    scores = scored(model)['a']
    assert list(scores) == ['norm']
    assert scores['norm'].tolist() == [6., 5., 4., 3., 2., 1., 0., 1., 2., 3., 4., 5.]


@pytest.mark.parametrize('norm', [nn.Identity(), nn.BatchNorm2d(2, affine=False),
                                  nn.GroupNorm(1, 2, affine=False)])
def test_layers_without_scales_may_be_left_alone(norm):
    model = Toy(chain('a', 'norm', 'pred'), a=nn.Conv2d(3, 2, 1), norm=norm,
                pred=nn.Conv2d(2, 1, 1))
    assert scored(model, without_norm='keep') == dict(a={})
    assert list(scored(model)['a']) == ['a']


def without_norm(*filters, layer=None):
    """The scores of filters of these mean weights, where the scales are 0.1 to 0.8."""
    model = Toy(chain('a', 'raw', 'pred'), a=Block(3, 8),
                raw=layer or nn.Conv2d(8, len(filters), 3), pred=nn.Conv2d(len(filters), 1, 1))
    model.a.bn.weight.data = torch.tensor([0.4, -0.1, 0.8, 0.2, -0.6, 0.5, 0.7, 0.3])
    signs = torch.tensor([1., -1.]).repeat(4)
    if layer is None:
        model.raw.weight.data = (torch.tensor(filters)[:, None] * signs)[..., None, None].expand(
            -1, -1, 3, 3).clone()
    return scored(model)['raw']['raw'].tolist()


def test_scale_of_the_same_rank_by_hand():
    # eight filters take the eight scales, four every second one, two the third and the seventh
    assert without_norm(3., 8., 1., 2., 7., 6., 5., 4.) == pytest.approx(
        [0.3, 0.8, 0.1, 0.2, 0.7, 0.6, 0.5, 0.4])
    assert without_norm(0.3, 0.1, 0.4, 0.2) == pytest.approx([0.6, 0.2, 0.8, 0.4])
    assert without_norm(20., 10.) == pytest.approx([0.7, 0.3])


def test_filters_of_one_layer_are_compared_with_each_other_only():
    assert without_norm(3e-5, 1e-5, 4e-5, 2e-5) == without_norm(300., 100., 400., 200.)


def test_model_without_normalisation():
    model = Toy(chain('a', 'b', 'pred'), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1),
                pred=nn.Conv2d(2, 1, 1))
    model.a.weight.data = torch.tensor([4., -2., -3., 1.]).view(4, 1, 1, 1).expand(
        -1, 3, -1, -1).clone()
    assert scored(model)['a']['a'].tolist() == pytest.approx([7 / 8, 3 / 8, 5 / 8, 1 / 8])
    assert sorted(scored(model)['b']['b'].tolist()) == pytest.approx([1 / 4, 3 / 4])


def test_weights_serve_only_channels_without_scales():
    """Of what a and b join with c, only a has a normalisation."""
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        c=nn.Conv2d(3, 4, 1), a=Block(3, 2), b=nn.Conv2d(3, 2, 1), pred=nn.Conv2d(4, 1, 1)))
    model.a.bn.weight.data = torch.tensor([0.3, -0.7])
    for layer, values in ((model.c, [9., 1., 3., 2.]), (model.b, [1., 2.])):
        layer.weight.data = torch.tensor(values)[:, None, None, None].expand(-1, 3, 1, 1).clone()
    scores = scored(model)['c']
    assert set(scores) == {'a.bn', 'b', 'c'}
    assert scores['a.bn'][:2].tolist() == pytest.approx([0.3, 0.7])
    # the third and second of c's four filters, b's two
    assert scores['c'][2:].tolist() == pytest.approx([0.7, 0.3])
    assert scores['b'][2:].tolist() == pytest.approx([0.3, 0.7])
    assert scores['a.bn'][2:].isnan().all()
    assert scores['b'][:2].isnan().all() and scores['c'][:2].isnan().all()
    kept = scored(model, without_norm='keep')['c']
    assert list(kept) == ['a.bn'] and kept['a.bn'][2:].isnan().all()


@pytest.mark.parametrize('layer', [
    nn.ConvTranspose2d(8, 4, 2), nn.ConvTranspose2d(8, 4, 2, groups=2),
    nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(8, 4, (1, 3))])
def test_filters_of_other_convolutions(layer):
    """The filter of an output channel is what it is computed with."""
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        weight = layer.weight
        if isinstance(layer, nn.ConvTranspose2d):  # (inputs, outputs of a group, ...)
            for channel in range(4):
                size = 4 // layer.groups
                start = channel // size * (8 // layer.groups)
                weight[start:start + 8 // layer.groups, channel % size] = [.3, .1, .4, .2][channel]
        else:
            weight *= torch.tensor([.3, .1, .4, .2])[:, None, None, None]
    assert without_norm(0, 0, 0, 0, layer=layer) == pytest.approx([0.6, 0.2, 0.8, 0.4])


def test_filters_of_depthwise_convolutions():
    model = make_kind('depthwise_transposed')
    weights = torch.arange(1., 9)[:, None, None, None]
    model.up.weight.data = weights.expand_as(model.up.weight).clone()
    model.a.weight.data = weights.flip(0).expand_as(model.a.weight).clone()
    ranks = [(2 * index + 1) / 16 for index in range(8)]
    scores = scored(model)['a']
    assert {name: values.tolist() for name, values in scores.items()} == {
        'a': pytest.approx(ranks[::-1]), 'up': pytest.approx(ranks)}


def test_filters_of_linear_layers():
    model = Toy(lambda net, x: net.pred(net.raw(x.mean((2, 3)))), raw=nn.Linear(3, 2),
                pred=nn.Linear(2, 1))
    model.raw.weight.data = torch.tensor([[1., -2., 3.], [1., 1., 1.]])
    assert scored(model)['raw']['raw'].tolist() == [0.75, 0.25]


def test_is_registered():
    assert isinstance(TASK_UTILS.build(dict(type='mmgcp.BNScale')), BNScale)
    criterion = TASK_UTILS.build(dict(type='mmgcp.BNScale', without_norm='keep'))
    assert criterion.without_norm == 'keep'


def test_unknown_way_without_normalisation():
    with pytest.raises(PruningError, match="without_norm must be one of .*, but is 'remove'"):
        BNScale(without_norm='remove')
