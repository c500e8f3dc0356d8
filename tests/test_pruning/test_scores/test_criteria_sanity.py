# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Channels that are known to be of no use go first, and detectors are pruned by each criterion."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_kinds import KINDS, make_kind
from loss_toys import SHAPE, LossToy, assert_as_before, make_batches, relu_block, snapshot
from pruning_samples import GROUPS, difference, randomise, run
from yolov4_samples import batch

from mmgcp.analysis import count_complexity
from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import LayerGroup, prune
from mmgcp.pruning.scores import criterion_names
from mmgcp.registry import TASK_UTILS

CRITERIA = ('APoZ', 'BNScale', 'FPGM', 'GroupFisher', 'L1Norm', 'L2Norm', 'OBS', 'Random',
            'Taylor')
PLANTED = dict(stem=4, a=3)  # channels of no use; the stem has 12 in all, a has 8


def toy():
    """A shortcut with ReLU, and a layer inside of it."""
    def run(net, x):
        x = net.stem(x)
        return net.pred(x + net.b(net.a(x)))

    return randomise(LossToy(run, stem=relu_block(3, 12, 3), a=relu_block(12, 8, 3),
                             b=relu_block(8, 12), pred=nn.Conv2d(12, 2, 1)))


def choose_planted(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(size, generator=generator)[:PLANTED[name]].sort().values
            for name, size in (('stem', 12), ('a', 8))}


# Each plants channels that a criterion has to find, and leaves the others large in every way

def plant_zero_filters(model, planted):
    for block, name in ((model.stem, 'stem'), (model.b, 'stem'), (model.a, 'a')):
        block.conv.weight[planted[name]] *= 1e-4


def plant_unread(model, planted):
    """Nothing that is computed of them changes the loss."""
    model.a.conv.weight[:, planted['stem']] = 0
    model.pred.weight[:, planted['stem']] = 0
    model.b.conv.weight[:, planted['a']] = 0


def plant_dead(model, planted):
    """ReLU never lets anything through."""
    for block, name in ((model.stem, 'stem'), (model.b, 'stem'), (model.a, 'a')):
        block.bn.weight[planted[name]] = 1.5
        block.bn.bias[planted[name]] = -100


def plant_median(model, planted):
    """Filters in the middle of the others, with norms as large as theirs."""
    generator = torch.Generator().manual_seed(5)
    for block, name in ((model.stem, 'stem'), (model.b, 'stem'), (model.a, 'a')):
        weight = block.conv.weight
        centre = torch.full_like(weight[0], 3.)
        offsets = torch.randn(weight.shape, generator=generator)
        weight[:] = centre + offsets / offsets.flatten(1).norm(dim=1)[:, None, None, None]
        weight[planted[name]] = centre + 1e-3 * offsets[planted[name]]


PLANTINGS = dict(L1Norm=plant_zero_filters, L2Norm=plant_zero_filters, FPGM=plant_median,
                 APoZ=plant_dead, Taylor=plant_unread, GroupFisher=plant_unread, OBS=plant_unread)
GROUPS_OF_TOY = [LayerGroup('outside', ('stem', 'b'), ratio=PLANTED['stem'] / 12),
                 LayerGroup('inside', ('a', ), ratio=PLANTED['a'] / 8)]


def removed_from(model, name, **options):
    result = prune(model, GROUPS_OF_TOY, criterion=dict(type=f'mmgcp.{name}', **options),
                   batches=make_batches(4, 4), input_shape=SHAPE)
    return {key.split('.')[0]: value.tolist() for key, value in result.plan.removed().items()}


def planted_model(plant, planted):
    model = toy()
    with torch.no_grad():
        plant(model, planted)
    return model.eval().double()


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name, options', [
    ('L1Norm', {}), ('L1Norm', dict(normalize='max')), ('L1Norm', dict(fold_norm=True)),
    ('L2Norm', {}), ('L2Norm', dict(normalize='none')), ('FPGM', {}), ('APoZ', {}),
    ('APoZ', dict(zero='magnitude')), ('Taylor', {}), ('GroupFisher', {}),
    ('GroupFisher', dict(normalize=None)), ('GroupFisher', dict(normalize='flops')), ('OBS', {})])
def test_planted_channels_go(name, options, seed):
    """These, all of these, and nothing else."""
    planted = choose_planted(seed)
    model = planted_model(PLANTINGS[name], planted)
    before = run(copy.deepcopy(model), 8)
    found = removed_from(model, name, **options)
    assert found == {key: value.tolist() for key, value in planted.items()}
    assert model.stem.conv.out_channels == model.b.conv.out_channels == 8
    assert model.a.conv.out_channels == 5
    if name in ('Taylor', 'GroupFisher', 'APoZ', 'OBS'):  # what went had no influence at all
        assert difference(before, run(model, 8)) < 1e-9


@pytest.mark.parametrize('name, other', [
    ('FPGM', 'L1Norm'), ('L1Norm', 'APoZ'), ('APoZ', 'L2Norm'), ('Taylor', 'L1Norm'),
    ('GroupFisher', 'BNScale'), ('L2Norm', 'Random')])
def test_other_criteria_do_not_find_them(name, other):
    """So the test above is none that any criterion passes."""
    planted = choose_planted(0)
    model = planted_model(PLANTINGS[name], planted)
    assert removed_from(model, other) != {key: value.tolist() for key, value in planted.items()}


def test_random_choice_depends_on_the_seed():
    first, again, other = (removed_from(toy().double(), 'Random', seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def batches_of(model):
    return [Batch(data['inputs'], data['data_samples']) for data in (
        model.data_preprocessor(batch(seed), True) for seed in range(2))]


@pytest.mark.parametrize('name', CRITERIA)
def test_budget_of_a_detector(name, model):
    """The comparison of the pruned with the masked model is part of pruning."""
    groups = [LayerGroup(**group) for group in GROUPS]
    seen = []
    result = prune(model, groups, target_flops=0.6, criterion=dict(type=f'mmgcp.{name}'),
                   batches=batches_of(model), input_shape=(3, 64, 64),
                   progress=lambda stage, done, steps: seen.append((stage, done, steps)))
    assert result.macs[1] == pytest.approx(0.6 * result.macs[0], rel=0.01)
    assert result.macs[1] == count_complexity(model, (3, 64, 64))[1]
    assert result.plan.options['criterion'] == dict(type=f'mmgcp.{name}')
    scoring = [(done, steps) for stage, done, steps in seen if stage == 'scoring']
    needs = TASK_UTILS.get(f'mmgcp.{name}').needs
    assert scoring == ([(0, 2), (1, 2), (2, 2)] if needs else [])
    losses = model(*batches_of(model)[0], mode='loss')
    assert all(torch.isfinite(loss).all() for loss in losses.values())


@pytest.mark.parametrize('name', ['APoZ', 'FPGM', 'L1Norm', 'Random'])
@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_layers(kind, name):
    """With norm groups, conv groups, channels that only some layers have, and so on."""
    model = make_kind(kind).eval()
    images = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    result = prune(model, [dict(name='all', modules=['*'])], ratio=0.7, merge='mean',
                   criterion=dict(type=f'mmgcp.{name}'), batches=[Batch(images, {})],
                   input_shape=(3, 16, 20))
    assert result.changed_channels
    assert all(tensor.isfinite().all() for tensor in run(model, 20))


@pytest.mark.parametrize('name', ['APoZ', 'Taylor', 'GroupFisher', 'OBS'])
def test_data_are_needed(name):
    model = toy()
    before = snapshot(model)
    for batches, message in ((None, f'criterion .*{name} needs training data'),
                             ([], 'there are no batches of training data')):
        with pytest.raises(PruningError, match=message):
            prune(model, GROUPS_OF_TOY, criterion=dict(type=f'mmgcp.{name}'), batches=batches,
                  input_shape=SHAPE)
        assert_as_before(model, before)


def test_all_criteria_are_tested():
    names = set(criterion_names())
    assert names >= set(CRITERIA)
