# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import math
import re

import pytest
import torch
import torch.nn as nn
from layer_kinds import KINDS, make_kind, some_of_each
from pruning_samples import GROUPS, Block, Toy, choose, randomise

from mmgcp.analysis import count_complexity, record_convs
from mmgcp.errors import PruningError
from mmgcp.pruning import BNScale, LayerGroup
from mmgcp.pruning.allocate import thresholds_of_groups
from mmgcp.pruning.budget import Budget, find_thresholds
from mmgcp.pruning.cost import CostModel
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.options import PruneOptions
from mmgcp.pruning.scored import score_units
from mmgcp.pruning.select import Limits, Selection
from mmgcp.pruning.surgery import remove_channels

SHAPE = (3, 64, 96)


class Search:
    """Thresholds for a budget, and what they really leave.

    Attributes:
        thresholds (dict): The thresholds that were found.
        kept (dict): Number of channels that stay, by name of the unit.
        params, macs (float): Shares of parameters and MACs, counted after surgery.
        shares (Callable): Gives the shares that other thresholds would leave.
        gains (dict): Parameters and MACs of a channel, by name of the unit.
    """

    def __init__(self, model, units, groups=GROUPS, costs=None, shape=SHAPE, budget=None,
                 merge='or', min_keep_ratio=0.01, round_to=1, **targets):
        groups = [LayerGroup(**group) for group in groups]
        scored = score_units(model, units, BNScale(), groups, {})
        selection = Selection(scored, merge, Limits(min_keep_ratio, round_to))
        cost = CostModel(model, record_convs(model, shape), units)
        self.scored = scored
        self.gains = {unit.name: cost.costs(unit) for unit in units}

        def shares(thresholds):
            left = cost(selection.removed(thresholds))
            return left[0] / cost.params, left[1] / cost.macs

        self.shares = shares
        self.thresholds = find_thresholds(
            selection, groups, cost, thresholds_of_groups(scored, groups),
            budget or Budget(**targets), costs)
        removed = selection.removed(self.thresholds)
        self.kept = {unit.name: unit.size - len(removed.get(unit.name, ()))
                     for unit in units}
        remove_channels(model, units, removed)
        after = count_complexity(model, shape)
        self.params, self.macs = after[0] / cost.params, after[1] / cost.macs


@pytest.mark.parametrize('seed', range(4))
def test_cost_model_of_yolov4(model, units, seed):
    cost = CostModel(model, record_convs(model, SHAPE), units)
    assert cost({}) == count_complexity(model, SHAPE) == (cost.params, cost.macs)
    removed = choose(units, seed)
    predicted = cost(removed)
    remove_channels(model, units, removed)
    assert predicted == count_complexity(model, SHAPE)
    assert predicted[0] < 0.8 * cost.params


@pytest.mark.parametrize('kind', KINDS)
def test_cost_model_of_other_layers(kind):
    for seed in range(3):
        model = make_kind(kind)
        units, skipped = find_units(model, (3, 16, 20))
        assert list(skipped) == ['pred']
        cost = CostModel(model, record_convs(model, (3, 16, 20)), units)
        before = count_complexity(model, (3, 16, 20))
        assert cost({}) == before
        removed = some_of_each(units, seed)
        predicted = cost(removed)
        remove_channels(model, units, removed)
        assert predicted == count_complexity(model, (3, 16, 20))
        assert predicted[0] < before[0] and predicted[1] < before[1]


@pytest.mark.parametrize('kind', sorted(set(KINDS) - {'biased'}))
def test_costs_are_what_one_channel_takes_away(kind):
    model = make_kind(kind)
    units, _ = find_units(model, (3, 16, 20))
    cost = CostModel(model, record_convs(model, (3, 16, 20)), units)
    for unit in units:
        # the first channel, of each block, or with its unit
        gone = torch.tensor([0])
        if unit.norm_groups is not None:
            gone = (unit.norm_groups == 0).nonzero().flatten()
        if unit.conv_groups is not None:
            gone = torch.tensor([unit.conv_groups.tolist().index(block)
                                 for block in range(int(unit.conv_groups.max()) + 1)])
        params, macs = cost({unit.name: gone})
        expected = ((cost.params - params) / len(gone) / cost.params,
                    (cost.macs - macs) / len(gone) / cost.macs)
        assert cost.costs(unit) == pytest.approx(expected)


def costs_of(kind, shape=(3, 8, 8)):
    """The costs by set in numbers of parameters and MACs, and the totals of both."""
    model = make_kind(kind)
    units, _ = find_units(model, shape)
    cost = CostModel(model, record_convs(model, shape), units)
    shares = {unit.name: cost.costs(unit) for unit in units}
    return {name: (params * cost.params, macs * cost.macs)
            for name, (params, macs) in shares.items()}, cost


def test_costs_of_a_channel_by_hand():
    costs, cost = costs_of('plain')
    # a filter, its two norm parameters, and the kernels that read it; b has a quarter of the map
    assert costs['a.conv'] == pytest.approx((27 + 2 + 6 * 9, 64 * 27 + 16 * 6 * 9))
    assert costs['b.conv'] == pytest.approx((72 + 2 + 2, 16 * (72 + 2)))
    assert cost.params == 8 * 27 + 16 + 6 * 72 + 12 + 14
    assert cost.macs == 64 * 8 * 27 + 16 * 6 * 72 + 16 * 12


def test_costs_in_a_depthwise_convolution_by_hand():
    costs, _ = costs_of('depthwise')
    # a: 3 + 2; depthwise: 9 + 1; its norm: 2; b: 6
    assert costs['a.conv'] == pytest.approx((5 + 10 + 2 + 6, 64 * (3 + 9 + 6)))


def test_costs_in_a_grouped_convolution_by_hand():
    costs, _ = costs_of('grouped')
    # a channel is read by the three filters of its group; a filter reads four channels
    assert costs['a.conv'] == pytest.approx((3 + 2 + 27, 64 * 3 + 36 * 27))
    assert costs['parts'] == pytest.approx((36 + 1 + 2 + 2, 36 * (36 + 2)))


def test_costs_of_bare_parameters_and_transposed_convolutions_by_hand():
    assert costs_of('parameter')[0]['a.conv'] == pytest.approx((3 + 2 + 1 + 1 + 2, 64 * 5))
    costs, _ = costs_of('transposed')
    # 4x4 before, 9x9 after
    assert costs['a.conv'] == pytest.approx((3 + 2 + 54, 16 * (3 + 54)))
    assert costs['up'] == pytest.approx((72 + 1 + 2 + 2, 16 * 72 + 81 * 2))


def test_layers_that_do_not_run_count_as_parameters():
    model = make_kind('biased')
    _, cost = costs_of('biased', (3, 16, 20))
    assert cost.convs['unused'].positions == 0
    assert cost.params == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize('target', [0.8, 0.353])
def test_target_of_parameters(model, units, target):
    found = Search(model, units, params=target)
    assert found.params == pytest.approx(target, rel=0.01) and found.params <= target
    assert set(found.thresholds) == {group['name'] for group in GROUPS}
    assert len(set(found.thresholds.values())) == len(GROUPS)


def test_target_of_operations(model, units):
    found = Search(model, units, flops=0.6)
    assert found.macs == pytest.approx(0.6, rel=0.01) and found.macs <= 0.6


@pytest.mark.parametrize('merge', ['mean', 'majority', 'sum'])
def test_target_with_other_merges(model, units, merge):
    assert Search(model, units, merge=merge, params=0.5).params == pytest.approx(0.5, rel=0.01)


PYRAMID_GROUPS = [dict(name='front', modules=['conv[0-2]']),
                  dict(name='end', modules=['conv[3-5]'])]


@pytest.fixture
def pyramid():
    """Many MACs in front, many parameters at the end."""
    names = [f'conv{index}' for index in range(6)]
    widths = [3, 32, 32, 32, 64, 64, 64]

    def forward(net, x):
        for name in names:
            x = getattr(net, name)(x)
        return net.pred(x)

    model = randomise(Toy(forward, pred=nn.Conv2d(64, 2, 1), **{
        name: Block(inputs, outputs, 3, stride=1 + index % 2)
        for index, (name, inputs, outputs) in enumerate(zip(names, widths, widths[1:]))}))
    return model, find_units(model, SHAPE)[0], PYRAMID_GROUPS


@pytest.mark.parametrize('target_params, target_flops', [(0.5, 0.5), (0.5, 0.45)])
def test_both_targets(pyramid, target_params, target_flops):
    found = Search(*pyramid, params=target_params, flops=target_flops)
    assert found.params == pytest.approx(target_params, rel=0.01)
    assert found.macs == pytest.approx(target_flops, rel=0.01)


def test_both_targets_of_yolov4(model, units):
    found = Search(model, units, params=0.4, flops=0.5)
    assert found.params == pytest.approx(0.4, rel=0.01)
    assert found.macs == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize('params, flops, options', [
    (0.1, 0.95, {}), (0.95, 0.1, {}), (0.95, 0.1, dict(round_to=8))])
def test_both_targets_that_exclude_each_other(pyramid, params, flops, options):
    with pytest.raises(PruningError, match=f'{flops:.1%} of the MACs cannot be reached'):
        Search(*pyramid, params=params, flops=flops, **options)


def gains(found, names):
    """The mean parameters and MACs of a channel of some units, which are of equal sizes."""
    shares = [found.gains[name] for name in names]
    return [sum(column) / len(column) for column in zip(*shares)]


PAIRS = [dict(name='one', modules=['conv[12]']), dict(name='two', modules=['conv3']),
         dict(name='three', modules=['conv[45]'])]
SETS_OF_PAIRS = [['conv1.conv', 'conv2.conv'], ['conv3.conv'], ['conv4.conv', 'conv5.conv']]


@pytest.mark.parametrize('target, index', [('params', 0), ('flops', 1)])
def test_thresholds_minimise_squared_scores(pyramid, target, index):
    """Their squares are as the gains of the groups."""
    model, units, _ = pyramid
    found = Search(model, units, PAIRS, budget=Budget(**{target: 0.8}, tolerance=0.04))
    quotients = [found.thresholds[group['name']]**2 / gains(found, names)[index]
                 for group, names in zip(PAIRS, SETS_OF_PAIRS)]
    assert quotients == pytest.approx([quotients[0]] * 3)


@pytest.mark.parametrize('costs', [dict(three=2.5), dict(one=0.4, two=3., three=0.8)])
@pytest.mark.parametrize('target, index', [('params', 0), ('flops', 1)])
def test_thresholds_minimise_measured_costs(pyramid, target, index, costs):
    """Their squares are as the gains of the groups, divided by the costs."""
    model, units, _ = pyramid
    found = Search(model, units, PAIRS, costs, budget=Budget(**{target: 0.8}, tolerance=0.05))
    quotients = [found.thresholds[group['name']]**2 * costs.get(group['name'], 1.)
                 / gains(found, names)[index] for group, names in zip(PAIRS, SETS_OF_PAIRS)]
    assert quotients == pytest.approx([quotients[0]] * 3)


def test_thresholds_for_both_targets_mix_the_gains(pyramid):
    """Their squares are as params**(1 + t) * macs**-t with one t for all groups."""
    model, units, _ = pyramid
    found = Search(model, units, PAIRS, budget=Budget(params=0.7, flops=0.6, tolerance=0.04))
    squares = [math.log(found.thresholds[group['name']]**2) for group in PAIRS]
    params, macs = zip(*([math.log(gain) for gain in gains(found, names)]
                         for names in SETS_OF_PAIRS))

    def exponent(first, second):
        of_params, of_macs = params[first] - params[second], macs[first] - macs[second]
        return (squares[first] - squares[second] - of_params) / (of_params - of_macs)

    assert exponent(0, 1) == pytest.approx(exponent(0, 2)) == pytest.approx(exponent(1, 2))
    # neither of parameters alone nor of MACs
    assert abs(exponent(0, 1)) > 0.1 and abs(exponent(0, 1) + 1) > 0.1


@pytest.mark.parametrize('target', ['params', 'flops'])
def test_group_with_a_higher_cost_keeps_more(pyramid, target):
    model, units, groups = pyramid
    front, end = [], []
    for cost in (0.05, 0.3, 1., 3., 20.):
        found = Search(copy.deepcopy(model), units, groups, dict(front=cost), **{target: 0.5})
        assert getattr(found, dict(params='params', flops='macs')[target]) == pytest.approx(
            0.5, rel=0.01)
        front.append(sum(found.kept[f'conv{index}.conv'] for index in range(3)))
        end.append(sum(found.kept[f'conv{index}.conv'] for index in range(3, 6)))
    assert front == sorted(front) and end == sorted(end, reverse=True)
    assert len(set(front)) > 3 and front[-1] - front[0] > 24 and end[0] - end[-1] > 24


def test_only_relative_costs_matter(pyramid):
    model, units, groups = pyramid
    kept = [Search(copy.deepcopy(model), units, groups, dict(front=cost, end=2 * cost),
                   params=0.5).kept for cost in (1e-5, 1., 300.)]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize('cheap, dear', [('front', 'end'), ('end', 'front')])
def test_group_that_costs_next_to_nothing(pyramid, cheap, dear):
    """It pays alone as long as it can."""
    found = Search(*pyramid, {cheap: 1e-12, dear: 1.}, budget=Budget(flops=0.8, tolerance=0.03))
    assert found.macs == pytest.approx(0.8, rel=0.03)
    assert found.thresholds[cheap] > 1e5 * found.thresholds[dear]


def test_both_targets_with_costs(pyramid):
    found = Search(*pyramid, dict(front=2., end=0.3), params=0.5, flops=0.5)
    assert found.params == pytest.approx(0.5, rel=0.01)
    assert found.macs == pytest.approx(0.5, rel=0.01)


def test_whole_model_as_target(model, units):
    found = Search(model, units, params=1.)
    assert 0.99 < found.params <= 1


@pytest.mark.parametrize('name', ['params', 'flops'])
def test_unreachable_target_states_the_least(model, units, name):
    with pytest.raises(PruningError, match='cannot be reached') as caught:
        Search(model, units, min_keep_ratio=0.5, **{name: 0.05})
    stated = float(re.search(r'leave ([\d.]+)%', str(caught.value)).group(1)) / 100
    # by hand: every layer at half of its channels
    before = count_complexity(model, SHAPE)
    remove_channels(model, units, {
        unit.name: torch.arange(unit.size // 2) for unit in units})
    after = count_complexity(model, SHAPE)
    index = ('params', 'flops').index(name)
    assert stated == pytest.approx(after[index] / before[index], abs=1e-3)


def test_fixed_groups_stay(model, units):
    groups = [dict(GROUPS[0], ratio=0.25), dict(GROUPS[1], threshold=0.3), *GROUPS[2:]]
    values = torch.cat([
        module.weight.detach() for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(
            ('backbone.stem', 'backbone.stage1', 'backbone.stage2', 'backbone.stage3'))])
    expected = float(values.sort().values[len(values) // 4 - 1])
    found = Search(model, units, groups, params=0.4)
    assert found.thresholds['stride-8'] == pytest.approx(expected, rel=2e-6)
    assert found.thresholds['stride-16'] == 0.3
    assert found.params == pytest.approx(0.4, rel=0.01)


def test_nothing_left_to_decide(model, units):
    groups = [dict(group, ratio=0.1) for group in GROUPS]
    with pytest.raises(PruningError, match='nothing is left'):
        Search(model, units, groups, params=0.5)


def test_group_without_layers_to_prune(model, units):
    groups = [*GROUPS, dict(name='loss', modules=['data_preprocessor'])]
    with pytest.raises(PruningError, match="'loss' has no prunable layer"):
        Search(model, units, groups, params=0.5)


@pytest.mark.parametrize('target', [1e-9, 0.5, 1, 1.])
def test_shares_that_can_be_asked_for(target):
    assert Budget(params=target) and Budget(flops=target) and not Budget()
    PruneOptions(target_params=target, target_flops=target)


@pytest.mark.parametrize('target', [0, -0.1, 1.001, 50, math.nan])
@pytest.mark.parametrize('name', ['params', 'flops'])
def test_shares_that_cannot_be_asked_for(name, target):
    with pytest.raises(PruningError, match=rf'target_{name} is the share to keep, in \(0, 1\], '
                                           f'but is {target}'):
        PruneOptions(**{f'target_{name}': target})


@pytest.mark.parametrize('targets', [dict(params=0.5), dict(params=0.83), dict(flops=0.5)])
def test_equal_scores(model, units, targets):
    """As at the start of a training: all scale factors are one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    found = Search(model, units, **targets)
    assert dict(params=found.params, flops=found.macs).items() >= {
        name: pytest.approx(target, rel=0.01) for name, target in targets.items()}.items()
    # what is not needed is not taken
    assert any(found.kept[unit.name] == unit.size for unit in units)


@pytest.mark.parametrize('target', [0.5, 0.9, 1.])
def test_scores_of_zero(pyramid, target):
    """A quarter of the channels are as good as gone, but not more than the target needs go."""
    model, units, groups = pyramid
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::4] = 0
    found = Search(model, units, groups, params=target)
    assert found.params == pytest.approx(target, rel=0.01) and found.params <= target
    gone = sum(unit.size - found.kept[unit.name] for unit in units)
    zeros = sum(unit.size for unit in units) / 4
    assert gone > zeros if target == 0.5 else gone < zeros


@pytest.mark.parametrize('targets', [dict(params=0.5), dict(params=0.77), dict(flops=0.4)])
def test_multiples_come_near_from_below(pyramid, targets):
    model, units, groups = pyramid
    found = Search(model, units, groups, round_to=8, **targets)
    assert all(number % 8 == 0 for number in found.kept.values())
    (name, target), = targets.items()
    index = ('params', 'flops').index(name)
    share = (found.params, found.macs)[index]
    # not worse than the best thresholds in the ratio of the roots of the gains, of which each
    # score may be one
    front = [f'conv{number}.conv' for number in range(3)]
    end = [f'conv{number}.conv' for number in range(3, 6)]
    ratio = (gains(found, front)[index] / gains(found, end)[index])**0.5
    scores = {name: torch.cat([next(iter(item.scores.values())) for item in found.scored
                               if item.unit.name in names]).tolist()
              for name, names in (('front', front), ('end', end))}
    limits = [*scores['end'], *(score / ratio for score in scores['front'])]
    reached = [found.shares(dict(front=limit * ratio * (1 + 1e-9), end=limit * (1 + 1e-9)))[index]
               for limit in limits]
    best = max(share for share in reached if share <= target)
    assert best - 1e-9 <= share <= target
    assert best > 0.9 * target


def test_multiples_or_all(model, units):
    found = Search(model, units, params=0.6, round_to=8)
    sizes = {unit.name: unit.size for unit in units}
    assert all(number % 8 == 0 or number == sizes[name] for name, number in found.kept.items())
    assert any(number < sizes[name] for name, number in found.kept.items())
    assert 0.5 < found.params <= 0.6


@pytest.mark.parametrize('params, flops', [(0.5, 0.5), (0.5, 0.45), (0.7, 0.6)])
def test_multiples_exceed_neither_of_both_targets(pyramid, params, flops):
    found = Search(*pyramid, params=params, flops=flops, round_to=8)
    assert all(number % 8 == 0 for number in found.kept.values())
    assert 0.8 * params < found.params <= params and 0.8 * flops < found.macs <= flops


def stepping_toy(low, groups=2):
    """A body in steps of channels, and a head in few large steps, as FCOS has with GroupNorm.

    The first half of the head's channels has scores of ``low``, the other of one.
    """
    def run(net, x):
        return net.pred(net.norm(net.head(net.b(net.a(x)))))

    model = randomise(Toy(run, a=Block(3, 128), b=Block(128, 128), head=nn.Conv2d(128, 256, 1),
                          norm=nn.GroupNorm(groups, 256), pred=nn.Conv2d(256, 2, 1)))
    model.norm.weight.data[:128] = low
    model.a.bn.weight.data = torch.linspace(0.01, 1, 128)
    model.b.bn.weight.data = torch.linspace(0.011, 1.1, 128)
    return model, find_units(model, (3, 8, 8))[0]


STEPPING_GROUPS = [dict(name='body', modules=['[ab]']), dict(name='head', modules=['head', 'norm'])]


def search_steps(low, target, groups=STEPPING_GROUPS, norm_groups=2, **options):
    model, units = stepping_toy(low, norm_groups)
    return Search(model, units, groups, shape=(3, 8, 8), params=target, **options)


def shares_around_the_step(low):
    """The parameters right above and right below the head's large step."""
    found = search_steps(low, 1.)
    body = gains(found, ['a.conv', 'b.conv'])[0]
    limit = low * (body / found.gains['head'][0])**0.5
    return [found.shares(dict(head=low * shift, body=limit * shift))[0]
            for shift in (1 - 2e-6, 1 + 2e-6)]


def test_too_large_step_is_taken_and_others_keep_more():
    above, below = shares_around_the_step(0.3)
    assert above - below > 0.1
    target = (above + 2 * below) / 3
    found = search_steps(0.3, target)
    assert found.params == pytest.approx(target, rel=0.01) and found.params <= target
    assert found.kept['head'] == 128
    # less of the body than next to the step
    assert found.thresholds['body'] < 0.9 * 0.3 * (
        gains(found, ['a.conv', 'b.conv'])[0] / found.gains['head'][0])**0.5


def test_too_large_step_is_left_if_others_cannot_make_up_for_it():
    above, below = shares_around_the_step(0.02)
    assert above > 0.95 and below < 0.7
    found = search_steps(0.02, 0.85)
    assert found.params == pytest.approx(0.85, rel=0.01) and found.params <= 0.85
    assert found.kept['head'] == 256


@pytest.mark.parametrize('low', [0.02, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize('target', [0.9, 0.7, 0.5, 0.3])
def test_any_target_with_large_steps(low, target):
    found = search_steps(low, target)
    assert found.params == pytest.approx(target, rel=0.01) and found.params <= target
    assert found.kept['head'] in (128, 256)


def test_only_large_steps():
    groups, total = STEPPING_GROUPS[1:], 3 * 128 + 128**2 + 4 * 128 + 256 * 129 + 512 + 514
    # a unit of 64 channels: their filters, biases, scales, shifts, and what reads them
    shares = [1 - norm_groups * 64 * (128 + 1 + 2 + 2) / total for norm_groups in range(4)]
    found = search_steps(0.5, shares[2], groups, 4)
    assert found.kept == {'a.conv': 128, 'b.conv': 128, 'head': 128}
    assert found.params == pytest.approx(shares[2])
    with pytest.raises(PruningError, match='75.0% of the parameters cannot be met within 1%: the '
                                           f'nearest share below is {shares[2]:.1%}'):
        search_steps(0.5, 0.75, groups, 4)
    # with multiples, the nearest is what can be had
    found = search_steps(0.5, 0.75, groups, 4, round_to=8)
    assert found.params == pytest.approx(shares[2])
    with pytest.raises(PruningError, match=f'cannot be reached.* leave {shares[3]:.1%} at least'):
        search_steps(0.5, 0.4, groups, 4)


def test_tolerance():
    groups, total = STEPPING_GROUPS[1:], 3 * 128 + 128**2 + 4 * 128 + 256 * 129 + 512 + 514
    share = 1 - 128 * 133 / total
    for target, tolerance, met in ((1.02 * share, 0.01, False), (1.02 * share, 0.03, True),
                                   (1.1 * share, 0.03, False), (1.1 * share, 0.1, True)):
        budget = Budget(params=target, tolerance=tolerance)
        model, units = stepping_toy(0.5)
        if met:
            assert Search(model, units, groups, shape=(3, 8, 8), budget=budget).kept['head'] == 128
        else:
            with pytest.raises(PruningError, match=f'within {tolerance:.0%}'):
                Search(model, units, groups, shape=(3, 8, 8), budget=budget)


def test_budget_that_is_not_strict(pyramid):
    """The nearest will do where a strict one is refused."""
    groups, total = STEPPING_GROUPS[1:], 3 * 128 + 128**2 + 4 * 128 + 256 * 129 + 512 + 514
    model, units = stepping_toy(0.5)
    found = Search(model, units, groups, shape=(3, 8, 8), budget=Budget(params=0.9, strict=False))
    assert found.params == pytest.approx(1 - 128 * 133 / total) and found.params < 0.8
    # two that exclude each other: that of the parameters is met
    found = Search(*pyramid, budget=Budget(0.1, 0.95, strict=False))
    assert found.params == pytest.approx(0.1, rel=0.01) and found.macs < 0.9


def test_way_to_a_budget():
    budget = Budget(0.25, 0.36, tolerance=0.02)
    half = budget.on_the_way(0.5)
    assert half == Budget(pytest.approx(0.5), pytest.approx(0.6), 0.02, strict=False)
    assert Budget(flops=0.5).on_the_way(1 / 3) == Budget(
        flops=pytest.approx(0.5**(1 / 3)), strict=False)
    assert not Budget().on_the_way(0.5)
    assert [budget.exceeded(*shares) for shares in ((.25, .36), (.24, .4), (.3, .3), (1., 1.))] == [
        False, True, True, False]
    assert not Budget().exceeded(0., 0.) and Budget(flops=0.5).exceeded(1., 0.4)


def test_least_share_may_be_above_the_target_within_the_tolerance():
    groups, total = STEPPING_GROUPS[1:], 3 * 128 + 128**2 + 4 * 128 + 256 * 129 + 512 + 514
    least = 1 - 128 * 133 / total
    assert search_steps(0.5, 0.995 * least, groups).params == pytest.approx(least)
    with pytest.raises(PruningError, match='cannot be reached'):
        search_steps(0.5, 0.985 * least, groups)


@pytest.mark.parametrize('target, index', [('params', 0), ('flops', 1)])
@pytest.mark.parametrize('merge', ['or', 'mean', 'majority', 'sum'])
@pytest.mark.parametrize('share, min_keep_ratio, round_to', [(0.7, 0.3, 1), (0.75, 0.5, 8)])
def test_nearest_of_all_factors_beside_a_fixed_group(pyramid, merge, share, min_keep_ratio,
                                                     round_to, target, index):
    """With a group that has a threshold, and with limits: no other factor comes nearer."""
    model, units, _ = pyramid
    groups = [dict(PAIRS[0], threshold=0.4), *PAIRS[1:]]
    found = Search(model, units, groups, merge=merge, min_keep_ratio=min_keep_ratio,
                   round_to=round_to, **{target: share})
    assert found.thresholds['one'] == 0.4
    slopes = {name: found.thresholds[name] for name in ('two', 'three')}  # in the right ratio
    factors = {0.} | {float(score) / slope * shift for item in found.scored
                      for name in item.group_names() if name in slopes
                      for slope in [slopes[name]] for score in item.best_scores
                      for shift in (1 - 1e-9, 1 + 1e-9)}
    reached = [found.shares(dict(one=0.4, **{name: factor * slope
                                             for name, slope in slopes.items()}))[index]
               for factor in factors]
    best = max(value for value in reached if value <= share)
    assert (found.params, found.macs)[index] == pytest.approx(best, abs=1e-12)
