# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import GROUPS, Block, Toy, choose, randomise

from mmgcp.analysis import count_complexity, record_convs
from mmgcp.pruning import BNScale, LayerGroup, PruningError
from mmgcp.pruning.budget import CostModel, find_thresholds
from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.pruning.planner import make_plan, score_sets, thresholds_of_groups
from mmgcp.pruning.surgery import remove_channels

SHAPE = (3, 64, 96)


def search(model, sets, groups=GROUPS, min_keep_ratio=0.01, **targets):
    """Thresholds, and the shares of parameters and operations that they really leave."""
    groups = [LayerGroup(**group) for group in groups]
    scored = score_sets(model, sets, BNScale(), groups, {})
    before = count_complexity(model, SHAPE)
    found = find_thresholds(
        scored, groups, CostModel(model, record_convs(model, SHAPE), sets),
        lambda tried: make_plan(scored, tried, 'or', min_keep_ratio),
        thresholds_of_groups(scored, groups), **targets)
    remove_channels(model, sets, make_plan(scored, found, 'or', min_keep_ratio).removed())
    after = count_complexity(model, SHAPE)
    return found, after[0] / before[0], after[1] / before[1]


@pytest.mark.parametrize('seed', range(4))
def test_cost_model_of_yolov4(model, sets, seed):
    cost = CostModel(model, record_convs(model, SHAPE), sets)
    assert cost({}) == count_complexity(model, SHAPE) == (cost.params, cost.macs)
    removed = choose(sets, seed)
    predicted = cost(removed)
    remove_channels(model, sets, removed)
    assert predicted == count_complexity(model, SHAPE)
    assert predicted[0] < 0.8 * cost.params


@pytest.mark.parametrize('seed', range(3))
def test_cost_model_of_other_layers(seed):
    def forward(net, x):
        x = net.b(net.a(x))
        x = net.up(net.b2(net.b2(x)))
        return net.pred(F.leaky_relu(net.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))

    model = randomise(Toy(
        forward, a=nn.Conv2d(3, 6, 3, 2), b=Block(6, 5, 3), b2=Block(5, 5, 1),
        up=nn.ConvTranspose2d(5, 7, 3, 2), hidden=nn.Linear(28, 9), pred=nn.Linear(9, 2)))
    coupled_sets, _ = find_coupled_channels(model, (3, 16, 20))
    assert len(coupled_sets) == 4
    cost = CostModel(model, record_convs(model, (3, 16, 20)), coupled_sets)
    removed = choose(coupled_sets, seed)
    predicted = cost(removed)
    remove_channels(model, coupled_sets, removed)
    assert predicted == count_complexity(model, (3, 16, 20))


def test_costs_of_a_channel_by_hand():
    model = Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 4, 3), b=Block(4, 5, 1),
                pred=nn.Conv2d(5, 2, 1))
    coupled_sets, _ = find_coupled_channels(model, (3, 8, 8))
    cost = CostModel(model, record_convs(model, (3, 8, 8)), coupled_sets)
    params, macs = cost.costs(coupled_sets[0])
    total = 3 * 4 * 9 + 8 + 4 * 5 + 10 + 5 * 2 + 2
    assert cost.params == total
    # a filter, its two norm parameters, and the kernels that read it
    assert params == pytest.approx((3 * 9 + 2 + 5) / total)
    assert macs == pytest.approx((3 * 9 + 5) / (3 * 4 * 9 + 4 * 5 + 5 * 2))


@pytest.mark.parametrize('target', [0.8, 0.353])
def test_target_of_parameters(model, sets, target):
    found, params, _ = search(model, sets, target_params=target)
    assert params == pytest.approx(target, rel=0.01)
    assert set(found) == {group['name'] for group in GROUPS}
    assert len(set(found.values())) == len(found)


def test_target_of_operations(model, sets):
    assert search(model, sets, target_flops=0.6)[2] == pytest.approx(0.6, rel=0.01)


@pytest.fixture
def pyramid():
    """Many operations in front, many parameters at the end."""
    names = [f'conv{index}' for index in range(6)]
    widths = [3, 32, 32, 32, 64, 64, 64]

    def forward(net, x):
        for name in names:
            x = getattr(net, name)(x)
        return net.pred(x)

    model = randomise(Toy(forward, pred=nn.Conv2d(64, 2, 1), **{
        name: Block(inputs, outputs, 3, stride=1 + index % 2)
        for index, (name, inputs, outputs) in enumerate(zip(names, widths, widths[1:]))}))
    groups = [dict(name='front', modules=['conv[0-2]']), dict(name='end', modules=['conv[3-5]'])]
    return model, find_coupled_channels(model, SHAPE)[0], groups


@pytest.mark.parametrize('target_params, target_flops', [(0.5, 0.5), (0.5, 0.45)])
def test_both_targets(pyramid, target_params, target_flops):
    _, params, macs = search(*pyramid, target_params=target_params, target_flops=target_flops)
    assert params == pytest.approx(target_params, rel=0.01)
    assert macs == pytest.approx(target_flops, rel=0.01)


def test_both_targets_that_exclude_each_other(pyramid):
    with pytest.raises(PruningError, match='95.0% of the operations cannot be reached'):
        search(*pyramid, target_params=0.1, target_flops=0.95)


def test_whole_model_as_target(model, sets):
    assert search(model, sets, target_params=1.)[1] == pytest.approx(1., rel=0.01)


@pytest.mark.parametrize('name', ['params', 'flops'])
def test_unreachable_target_states_the_least(model, sets, name):
    with pytest.raises(PruningError, match='cannot be reached') as caught:
        search(model, sets, min_keep_ratio=0.5, **{f'target_{name}': 0.05})
    stated = float(re.search(r'leave ([\d.]+)%', str(caught.value)).group(1)) / 100
    # by hand: every layer at half of its channels
    before = count_complexity(model, SHAPE)
    remove_channels(model, sets, {
        coupled.name: torch.arange(coupled.size // 2) for coupled in sets})
    after = count_complexity(model, SHAPE)
    index = ('params', 'flops').index(name)
    assert stated == pytest.approx(after[index] / before[index], abs=1e-3)


def test_fixed_groups_stay(model, sets):
    groups = [dict(GROUPS[0], ratio=0.25), dict(GROUPS[1], threshold=0.3), *GROUPS[2:]]
    values = torch.cat([
        module.weight.detach() for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(
            ('backbone.stem', 'backbone.stage1', 'backbone.stage2', 'backbone.stage3'))])
    expected = float(values.sort().values[len(values) // 4 - 1])
    found, params, _ = search(model, sets, groups, target_params=0.4)
    assert found['stride-8'] == pytest.approx(expected) and found['stride-16'] == 0.3
    assert params == pytest.approx(0.4, rel=0.01)


def test_nothing_left_to_decide(model, sets):
    groups = [dict(group, ratio=0.1) for group in GROUPS]
    with pytest.raises(PruningError, match='nothing is left'):
        search(model, sets, groups, target_params=0.5)


def test_group_without_layers_to_prune(model, sets):
    groups = [*GROUPS, dict(name='loss', modules=['data_preprocessor'])]
    with pytest.raises(PruningError, match="'loss' has no prunable layer"):
        search(model, sets, groups, target_params=0.5)


def test_target_between_equal_scores(model, sets):
    """Where all scores are equal no thresholds lead near the target."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    try:
        params = search(model, sets, target_params=0.5)[1]
    except PruningError:
        return
    assert params == pytest.approx(0.5, rel=0.01)
