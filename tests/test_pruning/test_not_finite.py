# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Values that are not finite are refused, naming where they are, and the model is left alone."""
import copy

import pytest
import torch
import torch.nn as nn
from loss_toys import SHAPE, LossToy, make_batches
from pruning_samples import Block, randomise, residual_toy

from mmgcp.errors import PruningError, UserError
from mmgcp.pruning import Criterion, prune
from mmgcp.pruning.sensitivity import measure_sensitivity
from mmgcp.registry import TASK_UTILS

NAN, INF = float('nan'), float('inf')
GROUPS = [dict(name='all', modules=['stem', 'a[12]', 'b[12]'], ratio=0.5)]


def assert_refused(model, message, **options):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message) as caught:
        prune(model, GROUPS, **{'criterion': dict(type='mmgcp.BNScale'), 'compensate': False,
                                'input_shape': (3, 16, 16), **options})
    assert '\n' not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), state[name].nan_to_num(7)), name


@pytest.mark.parametrize('name', ['a1.conv.weight', 'b2.bn.weight', 'stem.bn.bias',
                                  'a2.bn.running_mean', 'b1.bn.running_var', 'pred.bias'])
@pytest.mark.parametrize('value', [NAN, INF])
def test_weights_and_statistics(name, value):
    model = residual_toy()
    model.state_dict()[name].view(-1)[0] = value
    assert_refused(model, f'the model cannot be pruned: {name} has 1 of .* not finite')


@pytest.mark.parametrize('variance', [-1., -1e-5])
def test_variances(variance):
    model = residual_toy()
    model.a1.bn.running_var[2] = variance
    assert_refused(model, 'a1.bn.running_var has a variance of -')


def test_variance_of_zero_is_pruned():
    model = residual_toy()
    model.a1.bn.running_var[2] = 0
    prune(model, GROUPS, criterion=dict(type='mmgcp.BNScale'), compensate=False,
          input_shape=(3, 16, 16))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_outputs():
    model = residual_toy()
    model.a1.conv.weight.data.fill_(3e38)
    assert_refused(model, 'the model cannot be pruned: a1.conv emits values that are not finite')


@pytest.fixture
def criterion():
    """A registered criterion with the scores of ``found``."""
    class Found(Criterion):
        found = {}

        def __call__(self, model, unit):
            return self.found.get(unit.name, {unit.name: torch.arange(unit.size).float()})

    TASK_UTILS.register_module(module=Found, name='Found')
    yield Found
    TASK_UTILS.module_dict.pop('Found')


@pytest.mark.parametrize('scores, message', [
    ({'a1.conv': torch.tensor([1., INF, 2, 3, 4, 5])}, 'channel 1 of a1.conv the score inf'),
    ({'a1.bn': torch.tensor([1., 2, -INF, 3, 4, 5])}, 'channel 2 of a1.bn the score -inf'),
    ({'a1.bn': torch.tensor([NAN, 2, 1, 3, 4, 5])}, 'channel 0 of a1.bn the score nan')])
def test_scores(criterion, scores, message):
    criterion.found = {'a1.conv': scores}
    assert_refused(residual_toy(), f'Found gives {message}', criterion=dict(type='mmgcp.Found'))


def taking(values):
    """A function of a model that returns one value after the other."""
    return lambda model: values.pop(0)


@pytest.mark.parametrize('metric', [NAN, INF, None, 'high', torch.ones(2)])
def test_metrics(metric):
    for values, owner in ([metric], 'the unpruned detector'), ([0.5, metric], 'a pruned detector'):
        with pytest.raises(PruningError, match=f'the metric of {owner} must be a finite number'):
            measure_sensitivity(*toy_selection(), taking(values), lambda removed: None,
                                lambda *step: None)


def toy_selection():
    from test_sensitivity import GROUPS as LAYER_GROUPS

    from mmgcp.pruning import BNScale
    from mmgcp.pruning.graph import find_units
    from mmgcp.pruning.scored import score_units
    from mmgcp.pruning.select import Selection
    model = residual_toy().eval()
    units, _ = find_units(model, (3, 16, 16))
    return (model, Selection(score_units(model, units, BNScale(), LAYER_GROUPS, {})),
            LAYER_GROUPS, False)


@pytest.mark.parametrize('kind', ['APoZ', 'Taylor', 'OBS'])
def test_images_to_score_with(kind):
    model = randomise(LossToy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 8, 3),
                              b=Block(8, 6), pred=nn.Conv2d(6, 2, 1)))
    batches = make_batches(2, 2)
    batches[1].images[0, 0, 0, 0] = NAN
    with pytest.raises(PruningError, match='batch 2 of the training data has pixels that are not '
                       'finite'):
        prune(model, 'auto', 0.5, criterion=dict(type=f'mmgcp.{kind}'), batches=batches,
              compensate=False, input_shape=SHAPE)


@pytest.mark.parametrize('mode', ['fold-means', 'adapt-norms', 'reconstruct'])
def test_images_to_compensate_with(mode):
    images = [torch.rand(2, 3, 16, 16), torch.full((2, 3, 16, 16), NAN)]
    model = residual_toy()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        prune(model, GROUPS, criterion=dict(type='mmgcp.BNScale'), compensate=mode,
              calibration=images, input_shape=(3, 16, 16))
    assert 'finite' in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
