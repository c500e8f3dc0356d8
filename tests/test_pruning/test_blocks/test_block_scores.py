# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from block_toys import SHAPE, block_net, make_batches
from loss_toys import assert_as_before, silent, snapshot

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import on_outputs
from mmgcp.pruning.blocks import remove_blocks
from mmgcp.pruning.blocks.scores import (
    block_costs,
    loss_changes,
    mean_loss,
    order_blocks,
    taylor_scores,
)

ABSENT = {'row.0': None, 'row.1': 'alpha', 'row.2': None, 'single': None}


def losses(model, batches):
    return [float(model(batch.images, batch.data_samples, mode='loss')['loss'].detach())
            for batch in batches]


def without(model, *names):
    model = copy.deepcopy(model)
    remove_blocks(model, {name: ABSENT[name] for name in names})
    return model


def test_loss_changes_are_those_of_removal():
    model, batches = block_net().double(), make_batches()
    before = snapshot(model)
    changes = loss_changes(model, ABSENT, batches, silent)
    assert_as_before(model, before)
    whole = losses(model, batches)
    assert mean_loss(model, batches, silent) == pytest.approx(sum(whole) / 2)
    for name in ABSENT:
        rest = losses(without(model, name), batches)
        assert changes[name] == pytest.approx((sum(rest) - sum(whole)) / 2)
    assert len(set(changes.values())) == 4


def test_taylor_is_the_derivative_with_respect_to_a_gate():
    model, batches = block_net().double(), make_batches()
    before = snapshot(model)
    scores = taylor_scores(model, ABSENT, batches, silent)
    assert_as_before(model, before)
    for name in ABSENT:
        found, step = 0., 1e-5
        for batch in batches:
            values = []
            for gate in (1 + step, 1 - step):
                scale = ABSENT[name] and model.get_submodule(name).alpha.detach()

                def hook(x, output, gate=gate, scale=scale):
                    shortcut = x if scale is None else scale * x
                    return shortcut + gate * (output - shortcut)

                with on_outputs(model, {name: hook}):
                    values += losses(model, [batch])
            found += abs(values[0] - values[1]) / (2 * step)
        assert scores[name] == pytest.approx(found / 2, rel=1e-5)


def test_costs_by_hand():
    costs = block_costs(block_net(), ['row.0', 'single'], SHAPE)
    params = 8 * 10 * 9 + 10 * 8 + 2 * (10 + 8)
    assert costs['row.0'] == (params, (8 * 10 * 9 + 10 * 8) * 16 * 16)
    assert costs['single'] == (6 * 8 * 9 + 8 * 6 + 2 * (8 + 6), (6 * 8 * 9 + 8 * 6) * 8 * 8)


@pytest.mark.parametrize('criterion', ['loss-change', 'taylor'])
def test_blocks_are_chosen_one_after_the_other(criterion):
    """The second one is the best of those that are left without the first one."""
    model, batches = block_net().double(), make_batches()
    score = dict(zip(('loss-change', 'taylor'), (loss_changes, taylor_scores)))[criterion]
    costs = block_costs(model, ABSENT, SHAPE)

    def best(model, absent):
        scores = score(model, absent, batches, silent)
        name = min(scores, key=lambda name: (max(scores[name], 0) / costs[name][1], scores[name]))
        return name, scores[name]

    first = best(model, ABSENT)
    left = {name: scale for name, scale in ABSENT.items() if name != first[0]}
    second = best(without(model, first[0]), left)
    found = order_blocks(model, ABSENT, 2, criterion, batches, SHAPE, None, silent)
    assert [name for name, _ in found] == [first[0], second[0]]
    assert [score for _, score in found] == pytest.approx([first[1], second[1]])


def test_blocks_are_scored_once_after_compensation():
    """Next is what costs least per MAC of what `without` returns, whatever has been chosen."""
    model, batches, asked = block_net().double(), make_batches(), []
    costs = block_costs(model, ABSENT, SHAPE)

    def compensated(name):
        asked.append(name)
        return without(model, name)

    found = order_blocks(model, ABSENT, 2, 'compensated-loss', batches, SHAPE, compensated, silent)
    assert asked == list(ABSENT)
    changes = loss_changes(model, ABSENT, batches, silent)
    expected = sorted(ABSENT, key=lambda name: (
        max(changes[name], 0) / costs[name][1], changes[name]))[:2]
    assert [name for name, _ in found] == expected
    assert dict(found) == {name: pytest.approx(changes[name]) for name in expected}


def test_blocks_that_do_harm_go_first():
    model, batches = block_net().double(), make_batches()
    changes = loss_changes(model, ABSENT, batches, silent)
    best = min(changes, key=changes.get)
    assert changes[best] < 0 < max(changes.values())
    assert order_blocks(model, ABSENT, 1, 'loss-change', batches, SHAPE, None, silent) == [
        (best, pytest.approx(changes[best]))]


@pytest.mark.parametrize('score', [loss_changes, taylor_scores])
def test_a_loss_that_is_not_finite(score):
    model = block_net()
    with torch.no_grad():
        model.pred.bias.fill_(float('inf'))
    with pytest.raises(PruningError, match='those of a trained detector'):
        score(model, ABSENT, make_batches(), silent)


@pytest.mark.parametrize('score', [loss_changes, taylor_scores])
def test_no_batches(score):
    with pytest.raises(PruningError, match='no batches'):
        score(block_net(), ABSENT, [], silent)
