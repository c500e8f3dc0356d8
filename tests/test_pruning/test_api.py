# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from pruning_samples import GROUPS, batch, difference, run, set_channels

from mmgcp.analysis import count_complexity
from mmgcp.pruning import LayerGroup, PruningError, count_channels, prune
from mmgcp.pruning.surgery import remove_channels

SHAPE = (3, 64, 96)


def rated(ratio):
    return [dict(group, ratio=ratio) for group in GROUPS]


def test_ratio(model):
    before = count_channels(model)
    complexity = count_complexity(model, SHAPE)
    result = prune(model, rated(0.5), input_shape=SHAPE)
    assert result.model is model
    assert [result.params[0], result.macs[0]] == list(complexity)
    assert [result.params[1], result.macs[1]] == list(count_complexity(model, SHAPE))
    assert result.params[1] < 0.6 * result.params[0]
    assert result.channels_before == before
    assert result.channels_after == count_channels(model)
    assert set(result.changed_channels) == {
        name for name in before if before[name] != result.channels_after[name]}
    assert result.uncompensated == []
    assert set(result.plan.skipped) == {
        f'bbox_head.head_module.convs_pred.{level}' for level in range(3)}
    for group in GROUPS:
        scores = result.scores[group['name']]
        share = (scores <= result.plan.thresholds[group['name']]).float().mean()
        assert float(share) == pytest.approx(0.5, abs=0.01)


def test_groups_of_both_kinds_are_equal(model):
    other = copy.deepcopy(model)
    first = prune(model, rated(0.3), input_shape=SHAPE)
    second = prune(other, [LayerGroup(**group) for group in rated(0.3)], input_shape=SHAPE)
    assert first.plan == second.plan
    assert difference(run(model), run(other)) == 0.


def test_without_compensation_it_is_surgery_alone(model, sets):
    other = copy.deepcopy(model)
    result = prune(model, rated(0.4), compensate=False, input_shape=SHAPE)
    expected = set_channels(copy.deepcopy(other), sets, result.plan.removed())
    assert difference(run(model), run(expected)) < 1e-9
    remove_channels(other, sets, result.plan.removed())
    assert difference(run(model), run(other)) == 0.


def test_compensation_changes_the_result(model):
    other = copy.deepcopy(model)
    prune(model, rated(0.4), input_shape=SHAPE)
    prune(other, rated(0.4), compensate=False, input_shape=SHAPE)
    assert difference(run(model), run(other)) > 1e-3


def test_both_budgets_are_options_of_the_plan(model):
    result = prune(model, GROUPS, target_flops=0.7, merge='majority', min_keep_ratio=0.1,
                   input_shape=SHAPE)
    assert result.macs[1] == pytest.approx(0.7 * result.macs[0], rel=0.01)
    assert result.plan.options == dict(
        criterion=dict(type='mmgcp.BNScale'), merge='majority', min_keep_ratio=0.1,
        compensate=True, target_params=None, target_flops=0.7)


def test_majority_removes_more_than_or(model):
    other = copy.deepcopy(model)
    assert (prune(model, rated(0.5), merge='majority', input_shape=SHAPE).params[1] <
            prune(other, rated(0.5), merge='or', input_shape=SHAPE).params[1])


def test_frozen_stages_and_modes_stay(model):
    model.train()
    for param in model.backbone.stage1.parameters():
        param.requires_grad = False
    model.neck.eval()
    prune(model, rated(0.4), input_shape=SHAPE)
    assert {name.split('.')[1] for name, param in model.named_parameters()
            if not param.requires_grad} == {'stage1'}
    assert model.training and model.backbone.stage2.training and not model.neck.training


def test_pruned_detector_trains_and_predicts(model):
    prune(model, rated(0.6), input_shape=SHAPE)
    model.train()
    losses = model(**model.data_preprocessor(batch(), True), mode='loss')
    total = sum(losses.values())
    total.backward()
    assert total.isfinite() and total > 0
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize('groups, options, message', [
    (GROUPS, {}, 'have neither a ratio nor a threshold'),
    (GROUPS, dict(target_params=0.), r'in \(0, 1\], but is 0'),
    (GROUPS, dict(target_flops=1.2), 'target_flops is the share'),
    (GROUPS, dict(target_params=0.001, min_keep_ratio=0.5), 'cannot be reached'),
    (rated(0.5), dict(target_params=0.5), 'nothing is left'),
    (rated(0.5), dict(merge='and'), 'merge must be'),
    ([dict(name='x', modules=['nothing'], ratio=0.5)], {}, 'matches no module'),
    ([dict(name='x', modules=['neck'], ratio=0.5),
      dict(name='y', modules=['neck.downsample_layers'], ratio=0.5)], {}, 'in two layer groups'),
])
def test_request_that_cannot_be_met_changes_nothing(model, groups, options, message):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message):
        prune(model, groups, input_shape=SHAPE, **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_in_no_group_keep_their_outputs(model):
    result = prune(model, [dict(name='neck', modules=['neck'], ratio=0.5)], input_shape=SHAPE)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith('neck'):
            assert result.channels_before[name] == result.channels_after[name]
    assert 'neck.downsample_layers.0.bn' in result.changed_channels
    assert 'backbone.stem.conv' not in result.changed_channels
