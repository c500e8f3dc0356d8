# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from loss_toys import SHAPE, LossToy, assert_as_before, make_batches, snapshot
from pruning_samples import Block, randomise, residual_toy

from mmgcp.errors import PruningError
from mmgcp.pruning import BNScale, LayerGroup, prune
from mmgcp.pruning.allocate import by_position
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scored import score_units
from mmgcp.pruning.select import Selection
from mmgcp.pruning.sensitivity import MAX_FACTOR, POSITION, SHARES, measure_sensitivity

GROUPS = [LayerGroup('stem', ('stem', 'b[12]')), LayerGroup('one', ('a1', )),
          LayerGroup('two', ('a2', ))]


def measure(drop, positions=False):
    """Measure with a metric of 0.8 that a function of the channels that are off lowers."""
    model = residual_toy().eval()
    state = copy.deepcopy(model.state_dict())
    units, _ = find_units(model, (3, 16, 16))
    scored = score_units(model, units, BNScale(), GROUPS, {})
    selection = Selection(by_position(scored, 'or') if positions else scored)
    compensated, steps, off = [], [], {}

    def count(name):
        def hook(layer, args, output):
            off[name] = int((output.flatten(2).abs().amax((0, 2)) == 0).sum())
        return hook

    def evaluate(net):
        handles = [getattr(net, name).conv.register_forward_hook(count(name))
                   for name in ('stem', 'a1', 'a2')]
        net(torch.rand(1, 3, 16, 16))
        for handle in handles:
            handle.remove()
        return 0.8 - drop(off)

    def compensate(removed):
        compensated.append({name: len(channels) for name, channels in removed.items()})
        model.pred.bias.data += 1  # has to be taken back
        model.b1.conv.weight.data *= 2

    found = measure_sensitivity(model, selection, GROUPS, positions, evaluate, compensate,
                                lambda *step: steps.append(step))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found, compensated, steps


def test_drops_by_hand():
    # The metric does not see the stem, a tenth of a1's channels, and a2's three times as much
    found, compensated, steps = measure(lambda off: 0.1 * off['a1'] + 0.3 * off['a2'])
    assert found.baseline == pytest.approx(0.8)
    assert set(found.metrics) == {'stem', 'one', 'two'}
    model = residual_toy()
    costs, removed = [], []
    for name, factor in (('a1', 0.1), ('a2', 0.3)):
        squares = getattr(model, name).bn.weight.detach().double().square().sort().values
        numbers = [max(1, int((squares.cumsum(0) <= share * squares.sum()).sum()))
                   for share in SHARES]
        group = dict(a1='one', a2='two')[name]
        assert found.metrics[group] == {
            share: pytest.approx(0.8 - factor * number) for share, number in zip(SHARES, numbers)}
        removed += [{f'{name}.conv': number} for number in numbers]
        costs.append(sum(factor * number for number in numbers)
                     / sum(float(squares[:number].sum()) for number in numbers))
    assert found.costs['two'] / found.costs['one'] == pytest.approx(costs[1] / costs[0], rel=1e-4)
    assert compensated[2:] == removed
    assert [step[1:] for step in steps] == [(number, 7) for number in range(8)]


def test_costs_are_relative_and_bounded():
    found, _, _ = measure(lambda off: 1e-9 * off['a1'] + 100. * off['a2'])
    assert sorted(found.costs.values())[1] == 1.
    assert found.costs['two'] == MAX_FACTOR and found.costs['one'] >= 1 / MAX_FACTOR


def test_gain_counts_as_noise():
    gain, _, _ = measure(lambda off: -0.1 * off['a1'])
    nothing, _, _ = measure(lambda off: 0.)
    assert gain.costs == nothing.costs
    assert gain.metrics['one'][SHARES[1]] > 0.8


def test_positions_by_hand():
    """A drop is for channels, of which each unit of a group loses the same share."""
    found, compensated, steps = measure(lambda off: 0.1 * off['a1'] + 0.3 * off['a2'], True)
    number = round(6 * POSITION)
    assert compensated == [{'stem.conv': round(8 * POSITION)}, {'a1.conv': number},
                           {'a2.conv': number}]
    assert found.metrics['two'] == {POSITION: pytest.approx(0.8 - 0.3 * number)}
    assert found.costs['two'] / found.costs['one'] == pytest.approx(3)
    assert [step[1:] for step in steps] == [(number, 4) for number in range(5)]


def test_predictions_that_fail():
    """The way out is told, and the model is as before."""
    def run(net, x):
        return net.pred(net.b(net.a(x)))

    model = randomise(LossToy(run, a=Block(3, 8, 3), b=Block(8, 6), pred=nn.Conv2d(6, 2, 1)))
    before = snapshot(model)
    with pytest.raises(PruningError, match="measured: KeyError: .* allocation uniform does"):
        prune(model, [dict(name=name, modules=[name]) for name in 'ab'], target_flops=0.7,
              batches=make_batches(2), calibration=[batch.images for batch in make_batches(2)],
              input_shape=SHAPE)
    assert_as_before(model, before)


def test_a_detector_that_has_learnt_nothing(monkeypatch):
    """What depends on which group cannot be measured then, and all lose the same share."""
    def plan(**options):
        model = randomise(LossToy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 40, 3),
                                  b=Block(40, 30), pred=nn.Conv2d(30, 2, 1)))
        batches = make_batches(2)
        return prune(model, [dict(name=name, modules=[name]) for name in 'ab'], target_flops=0.7,
                     batches=batches, calibration=[batch.images for batch in batches],
                     input_shape=SHAPE, round_to=2, **options).plan

    monkeypatch.setattr('mmgcp.pruning.strategy.average_precision', lambda *_: 0.049)
    with pytest.warns(UserWarning, match='a metric of 0.049 on the calibration images: too little'):
        measured = plan(allocation='measured')
    equal = plan(allocation='uniform')
    assert [unit.removed for unit in measured.units] == [unit.removed for unit in equal.units]
    assert measured.options['sensitivity'] is None
    monkeypatch.setattr('mmgcp.pruning.strategy.average_precision', lambda *_: 0.051)
    assert plan(allocation='measured').options['sensitivity'] is not None
