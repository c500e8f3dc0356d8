# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from pruning_samples import residual_toy

from mmgcp.pruning import BNScale, LayerGroup
from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.pruning.planner import Planner, score_sets
from mmgcp.pruning.sensitivity import LEAST_DROP, measure_sensitivity

GROUPS = [LayerGroup('stem', ('stem', 'b[12]')), LayerGroup('one', ('a1', )),
          LayerGroup('two', ('a2', ))]


def measure(drop):
    """Measure with a metric of 0.8 that a function of the channels that are off lowers."""
    model = residual_toy().eval()
    state = copy.deepcopy(model.state_dict())
    sets, _ = find_coupled_channels(model, (3, 16, 16))
    planner = Planner(score_sets(model, sets, BNScale(), GROUPS, {}))
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

    found = measure_sensitivity(model, planner, GROUPS, evaluate, compensate,
                                lambda *step: steps.append(step))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found, compensated, steps


def test_cubic_of_the_drops():
    # The metric does not see a1, and a2 by the cube of the share of its six channels
    found, compensated, steps = measure(
        lambda off: 0.6 * (off['a2'] / 6)**3 if off['a2'] else 0.)
    assert found.baseline == pytest.approx(0.8)
    assert set(found.metrics) == {'stem', 'one', 'two'}
    # a quarter of six channels is one, half of them three
    assert found.metrics['one'] == {0.25: pytest.approx(0.8), 0.5: pytest.approx(0.8)}
    drops = (0.6 / 216, 0.6 / 8)
    assert found.metrics['two'][0.25] == pytest.approx(0.8 - drops[0])
    assert found.metrics['two'][0.5] == pytest.approx(0.8 - drops[1])
    least_squares = (drops[0] / 64 + drops[1] / 8) / (1 / 64**2 + 1 / 64)
    assert found.costs['two'] == pytest.approx(least_squares / 6)
    assert found.costs['one'] == pytest.approx(LEAST_DROP * 0.8 / 6)
    assert compensated[2:] == [{'a1.conv': 1}, {'a1.conv': 3}, {'a2.conv': 1}, {'a2.conv': 3}]
    assert [step[1:] for step in steps] == [(number, 7) for number in range(8)]


def test_gain_counts_as_no_cost():
    found, _, _ = measure(lambda off: -0.1 * off['a1'])
    assert found.costs['one'] == pytest.approx(LEAST_DROP * 0.8 / 6)
