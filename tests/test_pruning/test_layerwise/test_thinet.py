# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from layer_kinds import make_kind
from pruning_samples import Block, Toy, difference, randomise, residual_toy, run
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import count_channels, prune
from mmgcp.pruning.compensation.folding import constant_outputs
from mmgcp.pruning.compensation.statistics import measure_inputs
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layerwise import ThiNet, thinet
from mmgcp.pruning.layerwise.contributions import Entries, contributions, draw_entries
from mmgcp.pruning.layerwise.thinet import least_squares_factors, removal_ranks
from mmgcp.pruning.units import ChannelSlice

SHAPE = (3, 12, 14)


def batches(number=2, images=3, shape=SHAPE):
    """Images whose channels have means of their own."""
    return [Batch(torch.rand(images, *shape, generator=torch.Generator().manual_seed(seed))
                  + torch.tensor([0.2, 0.7, 1.5]).view(3, 1, 1), []) for seed in range(number)]


def concat_toy():
    """The channels of a are read twice by b, and once by the prediction."""
    def forward(net, x):
        x = net.a(x)
        y = net.b(torch.cat((x, net.c(x), F.max_pool2d(x, 3, 1, 1)), 1))
        return net.pred(torch.cat((y, x), 1))

    return randomise(Toy(forward, a=Block(3, 6, 3), c=Block(6, 5), b=Block(17, 4, 3),
                         pred=nn.Conv2d(10, 3, 1)))


def chain_toy():
    return randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 9, 3),
                         b=Block(9, 6, 3, stride=2), pred=nn.Conv2d(6, 2, 1)))


NETS = dict(chain=chain_toy, concat=concat_toy, residual=partial(residual_toy, 3),
            grouped=partial(make_kind, 'grouped'), transposed=partial(make_kind, 'transposed'),
            flattened=partial(make_kind, 'biased'))


def units_of(model):
    return {unit.name: unit for unit in find_units(model, SHAPE)[0]}


def draw_all(output, is_linear):
    """All entries of an output."""
    sizes = (len(output), output.shape[-1], output[0].numel() // output.shape[-1], 1) if is_linear \
        else output.shape
    return Entries(*torch.tensor(list(itertools.product(*map(range, sizes)))).unbind(1))


@torch.no_grad()
def explicit(model, unit, images):
    """All contributions (S, C), from outputs with a single channel on."""
    columns = []
    for index in range(-1, unit.size):
        outputs, handles = [], []
        for item in unit.side('in'):
            layer = model.get_submodule(item.module)
            off = item.channels[item.unit_index != index]
            alone = copy.deepcopy(layer)
            if layer.bias is not None:
                alone.bias.zero_()
            dim = -1 if isinstance(layer, nn.Linear) else 1

            def look(_, args, __, alone=alone, off=off, dim=dim, item=item, outputs=outputs):
                kept = torch.zeros_like(args[0]).index_copy(
                    dim, item.channels, args[0].index_select(dim, item.channels))
                outputs.append(alone(kept.index_fill(dim, off, 0.)).flatten())

            handles.append(layer.register_forward_hook(look))
        for image in images:
            model(image.images)
        for handle in handles:
            handle.remove()
        columns.append(torch.cat(outputs).double())
    assert not columns[0].any()
    return torch.stack(columns[1:], 1)


def greedy(x, number):
    """Algorithm 1 of the paper, with everything computed anew."""
    gone = []
    for _ in range(number):
        costs = {channel: float(x[:, [*gone, channel]].sum(1).square().sum())
                 for channel in range(x.shape[1]) if channel not in gone}
        gone.append(min(costs, key=costs.get))
    return gone


@pytest.mark.parametrize('make', [
    partial(nn.Conv2d, kernel_size=1),
    partial(nn.Conv2d, kernel_size=3, padding=1),
    partial(nn.Conv2d, kernel_size=(3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    partial(nn.Conv2d, kernel_size=(4, 3), padding='same'),
    partial(nn.Conv2d, kernel_size=3, padding=2, padding_mode='circular', groups=2),
    partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode='reflect', bias=False),
    partial(nn.ConvTranspose2d, kernel_size=2, stride=2),
    partial(nn.ConvTranspose2d, kernel_size=(3, 4), stride=(2, 3), padding=1, dilation=(2, 1),
            output_padding=(1, 0), groups=2),
])
def test_contributions_of_convolutions(make):
    torch.manual_seed(0)
    layer, inputs = make(8, 6).double(), torch.randn(2, 8, 6, 7).double()
    item = ChannelSlice('x', 'in', torch.tensor([1, 5, 6, 2, 7]), torch.tensor([0, 2, 2, 1, 3]))
    check_contributions(layer, inputs, item, 1)


@pytest.mark.parametrize('shape', [(2, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_contributions_of_linear_layers(shape):
    torch.manual_seed(0)
    item = ChannelSlice('x', 'in', torch.tensor([1, 5, 6, 2, 7]), torch.tensor([0, 2, 2, 1, 3]))
    check_contributions(nn.Linear(8, 6).double(), torch.randn(shape).double(), item, -1)


@torch.no_grad()
def check_contributions(layer, inputs, item, dim):
    output = layer(inputs)
    entries = draw_all(output, dim == -1)
    mean = torch.linspace(-1, 2, len(item.channels)).double()
    for means in (None, mean):
        found = contributions(layer, inputs, item, 4, entries, means)
        without = layer(torch.zeros_like(inputs))
        for index in range(4):
            mine = item.channels[item.unit_index == index]
            alone = torch.zeros_like(inputs)
            alone.index_copy_(dim, mine, inputs.index_select(dim, mine))
            expected = layer(alone) - without
            if means is not None:
                constant = torch.zeros(8).double()
                constant[mine] = means[item.unit_index == index]
                shape = [1] * expected.dim()
                shape[dim] = -1
                expected = expected - constant_outputs(layer, constant).mean(1).view(shape)
            if dim == -1:
                expected = expected.flatten(1, -2) if expected.dim() > 2 else expected[:, None]
                expected = expected[entries.images, entries.rows, entries.outputs]
            else:
                expected = expected[tuple(entries)]
            assert expected.abs().max() > 1e-2
            assert torch.allclose(found[:, index], expected, rtol=0, atol=1e-12)


def test_input_of_two_channels_counts_half():
    layer, inputs = nn.Linear(2, 1).double(), torch.randn(3, 2).double()
    item = ChannelSlice('x', 'in', torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    entries = Entries(torch.arange(3), *torch.zeros(3, 3).long())
    found = contributions(layer, inputs, item, 2, entries)
    one, two = (inputs * layer.weight).unbind(1)
    assert torch.allclose(found, torch.stack((one + two / 2, two / 2), 1))


@pytest.mark.parametrize('net', NETS)
def test_greedy_choice_is_that_of_the_paper(net, monkeypatch):
    """On all entries, for any number of removed channels, also with several consumers."""
    model = NETS[net]().double().eval()
    data = [Batch(batch.images.double(), []) for batch in batches()]
    monkeypatch.setattr(thinet, 'draw_entries', lambda layer, output, *_: draw_all(
        output, isinstance(layer, nn.Linear)))
    scored = 0
    for unit in units_of(model).values():
        x = explicit(model, unit, data)
        criterion = ThiNet()
        assert torch.allclose(criterion.sample(model, unit, data), x.t() @ x, atol=1e-8)
        scores = criterion.score(model, unit, data)
        assert scores.argsort().tolist() == greedy(x, unit.size)
        scored += 1
    assert scored > 1


def test_norm_groups_are_removed_as_a_whole():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)).double()
    norm_groups = torch.tensor([0, 1, 1, 2, 0, 2])
    ranks = removal_ranks(x.t() @ x, norm_groups)
    sums = torch.stack([x[:, norm_groups == group].sum(1) for group in range(3)], 1)
    assert ranks.tolist() == [greedy(sums, 3).index(group) for group in norm_groups.tolist()]


def test_factors_are_least_squares():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 7, generator=generator).double() @ torch.randn(7, 7).double()
    removed, kept = torch.tensor([0, 2, 5]), [1, 3, 4, 6]
    expected = np.linalg.lstsq(x[:, kept].numpy(), x.sum(1).numpy(), rcond=None)[0]
    factors = least_squares_factors(x.t() @ x, removed)
    assert np.allclose(factors[kept].numpy(), expected, atol=1e-8)
    assert factors[removed].tolist() == [1.] * 3
    assert not np.allclose(expected, 1, atol=1e-2)


def test_factors_of_dependent_channels():
    """Dead channels keep the factor 1; of equal ones, any sum of factors is as good."""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)).double()
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    factors = least_squares_factors(x.t() @ x, torch.tensor([0, 1]))
    expected = np.linalg.lstsq(x[:, [2, 3, 4, 5]].numpy(), x.sum(1).numpy(), rcond=None)[0]
    assert factors[3] == 1
    assert torch.allclose(factors[4], factors[5])
    fit = x[:, 2:] @ factors[2:]
    assert torch.allclose(fit, x[:, 2:] @ torch.from_numpy(expected), atol=1e-6)


def test_without_any_contribution_nothing_changes():
    assert least_squares_factors(torch.zeros(4, 4), torch.tensor([1])).tolist() == [1.] * 4


def test_dead_and_cancelling_channels_go_first():
    model = chain_toy().eval()
    with torch.no_grad():
        model.b.conv.weight[:, [2, 7]] = 0
        for part in (model.a.conv.weight, model.a.bn.weight, model.a.bn.bias,
                     model.a.bn.running_mean, model.a.bn.running_var):
            part[4] = part[1]
        model.b.conv.weight[:, 1] *= 0.01
        model.b.conv.weight[:, 4] = -model.b.conv.weight[:, 1]
    order = ThiNet().score(model, units_of(model)['a.conv'], batches()).argsort().tolist()
    assert set(order[:2]) == {2, 7} and set(order[2:4]) == {1, 4}


def test_duplicate_is_made_up_for():
    """The other one of two equal channels counts twice."""
    model = chain_toy().eval()
    with torch.no_grad():
        for part in (model.a.conv.weight, model.a.bn.weight, model.a.bn.bias,
                     model.a.bn.running_mean, model.a.bn.running_var):
            part[4] = part[1]
        model.b.conv.weight[:, 4] = model.b.conv.weight[:, 1]
    unit, criterion = units_of(model)['a.conv'], ThiNet()
    before = model.b.conv.weight.detach().clone()
    criterion.score(model, unit, batches())
    criterion.update(model, unit, torch.tensor([4]), batches())
    expected = before.clone()
    expected[:, 1] *= 2
    assert torch.allclose(model.b.conv.weight, expected, atol=1e-3)


@torch.no_grad()
def outputs_of(model, name, images, off=None):
    """What a layer, or the BatchNorm behind it, makes of images if inputs are zero."""
    found, layer = [], model.get_submodule(name)
    norm = dict(model.named_modules()).get(name.replace('.conv', '.bn'))
    watched = norm if isinstance(norm, _BatchNorm) else layer
    handles = [watched.register_forward_hook(lambda *args: found.append(args[-1].double()))]
    if off is not None:
        handles.append(layer.register_forward_pre_hook(
            lambda _, args: (args[0].index_fill(1, off, 0.), )))
    for batch in images:
        model(batch.images)
    for handle in handles:
        handle.remove()
    return torch.cat([output.transpose(0, 1).flatten(1) for output in found], 1)


@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('compensate', ['adapt-norms', False])
def test_factors_are_not_worse(kernel, compensate):
    """Than without factors, for the layer's outputs on the images themselves."""
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 12, 3),
                          b=Block(12, 8, kernel), pred=nn.Conv2d(8, 2, 1))).eval()
    data, errors = batches(3, 4), {}
    before = outputs_of(model, 'b.conv', data)
    plans = []
    for rescale in (False, True):
        pruned = copy.deepcopy(model)
        plans.append(prune(pruned, [dict(name='a', modules=['a'], ratio=0.5)],
                           criterion=dict(type='mmgcp.ThiNet', positions=400, rescale=rescale),
                           compensate=compensate, batches=data, input_shape=SHAPE).plan)
        after = outputs_of(pruned, 'b.conv', data)
        errors[rescale] = float((after - before).square().mean())
        if compensate and kernel == 1:
            assert torch.allclose(after.mean(1), before.mean(1), atol=1e-5)
    assert plans[0].removed().keys() == {'a.conv'} and plans[0].units == plans[1].units
    assert 0 < errors[True] < 0.99 * errors[False]


def test_compensation_helps():
    """The factors and constants are better together than the factors alone."""
    data, errors = batches(3, 4), {}
    for compensate in (True, False):
        model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 12, 3),
                              b=Block(12, 8), pred=nn.Conv2d(8, 2, 1))).eval()
        before = outputs_of(model, 'b.conv', data)
        prune(model, [dict(name='a', modules=['a'], ratio=0.5)], compensate=compensate,
              criterion=dict(type='mmgcp.ThiNet', positions=400), batches=data, input_shape=SHAPE)
        errors[compensate] = (outputs_of(model, 'b.conv', data) - before).square().mean()
    assert errors[True] < errors[False]


@pytest.mark.parametrize('net', NETS)
def test_kernels_that_read_the_unit_are_multiplied(net):
    model = NETS[net]().eval()
    for name, unit in units_of(model).items():
        if unit.conv_groups is not None or unit.size < 4:
            continue
        scaled, criterion = copy.deepcopy(model), ThiNet()
        criterion.score(scaled, unit, batches())
        gram = ThiNet().sample(model, unit, batches())
        factors = least_squares_factors(gram, torch.tensor([0, 2]))
        criterion.update(scaled, unit, torch.tensor([0, 2]), batches())
        consumers = {item.module: item for item in unit.side('in')}
        for key, value in scaled.state_dict().items():
            item = consumers.get(key[:-len('.weight')])
            old = model.state_dict()[key]
            if item is None:
                assert torch.equal(value, old), key
                continue
            layer = model.get_submodule(item.module)
            if isinstance(layer, nn.ConvTranspose2d):
                value, old = value.transpose(0, 1), old.transpose(0, 1)
            expected = old.clone()
            for channel, index in zip(item.channels.tolist(), item.unit_index.tolist()):
                if getattr(layer, 'groups', 1) == 1:
                    expected[:, channel] *= factors[index]
                else:
                    size, rows = layer.weight.shape[1], len(old) // layer.groups
                    part = channel // size
                    expected[part * rows:(part + 1) * rows, channel % size] *= factors[index]
            assert torch.allclose(value, expected) and not torch.allclose(value, old)
        assert name


def test_drawn_entries():
    layer, output = nn.Conv2d(3, 6, 1), torch.zeros(2, 6, 4, 5)
    for removed, left in ((None, set(range(6))), (torch.tensor([0, 4]), {1, 2, 3, 5})):
        entries = draw_entries(layer, output, 200, removed, torch.Generator())
        assert set(entries.outputs.tolist()) == left
        assert entries.images.bincount().tolist() == [200, 200]
        assert entries.rows.max() == 3 and entries.columns.max() == 4


def test_removed_outputs_are_not_sampled():
    model = chain_toy().eval()
    units = units_of(model)
    criterion = ThiNet(positions=200)
    criterion.score(model, units['b.conv'], batches())
    criterion.update(model, units['b.conv'], torch.tensor([0, 4]), batches())
    other = ThiNet(positions=200)
    other.load_state_dict(criterion.state_dict())
    with torch.no_grad():
        model.b.conv.weight[[0, 4]] = float('nan')
    grams = [item.sample(model, units['a.conv'], batches())
             for item in (criterion, other, ThiNet(positions=200))]
    assert grams[0].isfinite().all() and torch.equal(grams[0], grams[1])
    assert grams[2].isnan().any()


def test_scores_repeat_and_leave_the_model_alone():
    model = concat_toy()
    model.b.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    for folded in (True, False):
        first, again = ThiNet(), ThiNet()
        first.folded = again.folded = folded
        for unit in units_of(model).values():
            scores = first.score(model, unit, batches())
            assert sorted(scores.tolist()) == list(range(unit.size))
            assert torch.equal(scores, again.score(model, unit, batches()))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_shortcuts_are_left_alone_if_asked():
    model, other = residual_toy(), residual_toy()
    options = dict(groups=[dict(name='all', modules=['*'], ratio=0.5)], batches=batches(),
                   input_shape=SHAPE)
    result = prune(model, criterion=dict(type='mmgcp.ThiNet', skip_shortcuts=True), **options)
    assert {item.name: len(item.removed) for item in result.plan.units} == {
        'stem.conv': 0, 'a1.conv': 3, 'a2.conv': 3}
    assert 'several layers compute together' in result.plan.skipped['b1.conv']
    again = residual_toy()
    prune(again, plan=result.plan, compensate=False, input_shape=SHAPE)
    assert count_channels(again) == count_channels(model)
    full = prune(other, criterion=dict(type='mmgcp.ThiNet'), **options)
    assert {item.name: len(item.removed) for item in full.plan.units}['stem.conv'] == 4


@pytest.mark.parametrize('net', NETS)
def test_mean_inputs(net):
    """They are the means over the batches, known of the unit that was scored last."""
    model = NETS[net]().eval()
    units, criterion, last = units_of(model), ThiNet(), None
    criterion.folded = True
    for unit in units.values():
        criterion.score(model, unit, batches())
        measured = measure_inputs(
            model, {item.module: item.channels for item in unit.side('in')},
            [batch.images for batch in batches()])
        found = criterion.mean_inputs(unit)
        assert found.keys() == measured.keys() and found
        for name, entries in found.items():
            assert entries.keys() == measured[name].keys()
            assert all(torch.equal(mean, measured[name][norms].mean)
                       for norms, mean in entries.items())
        assert last is None or criterion.mean_inputs(last) is None
        last = unit
    criterion.folded = False
    criterion.score(model, last, batches())
    assert criterion.mean_inputs(last) is None


@pytest.mark.parametrize('net', NETS)
def test_means_of_the_scores_are_folded(net):
    """The result is the same as if the means are measured anew, on the same images."""
    model, images = NETS[net](), [batch.images for batch in batches()]
    found = []
    for calibration in (None, images):
        pruned = copy.deepcopy(model)
        result = prune(pruned, [dict(name='all', modules=['*'], ratio=0.5)], batches=batches(),
                       criterion=dict(type='mmgcp.ThiNet'), input_shape=SHAPE,
                       calibration=calibration)
        assert result.plan.removed()
        found.append((result.plan.units, result.uncompensated, pruned.state_dict()))
    (units, missed, state), (other_units, other_missed, other_state) = found
    assert units == other_units and missed == other_missed
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


def test_no_batches():
    with pytest.raises(PruningError, match='there are no images to sample'):
        ThiNet().score(chain_toy(), units_of(chain_toy())['a.conv'], [])


@pytest.mark.parametrize('positions', [0, -3])
def test_wrong_positions(positions):
    with pytest.raises(PruningError, match=f'positions must be .* but is {positions}'):
        ThiNet(positions=positions)


def test_update_without_score():
    model = chain_toy()
    with pytest.raises(PruningError, match='has to be scored before its update'):
        ThiNet().update(model, units_of(model)['a.conv'], torch.tensor([1]), batches())


def test_budget_of_yolov4(model):
    shape = (3, 64, 64)
    before = copy.deepcopy(model)
    groups = [dict(name='last', modules=['neck.bottom_up_layers.1', 'neck.downsample_layers.1'])]
    result = prune(model, groups, target_params=0.95, batches=batches(1, 1, shape),
                   criterion=dict(type='mmgcp.ThiNet', positions=10), input_shape=shape)
    assert result.params[1] == pytest.approx(0.95 * result.params[0], rel=0.01)
    assert result.params[1] == sum(param.numel() for param in model.parameters())
    assert difference(run(before), run(model)) > 0
    shares = [len(item.removed) / item.size for item in result.plan.units if item.removed]
    assert len(shares) > 2 and max(shares) - min(shares) < 0.15
