# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning with two processes, which share the batches: the plan and the weights of one process."""
import copy

import pytest
import torch
import torch.nn as nn
from auxiliary_toys import BOXES, SIZE, TinyDetector, make_batches, mmyolo_samples
from mmdet.utils import reduce_mean
from mmengine.dist import get_rank, get_world_size
from pruning_samples import randomise
from ranks import on_ranks

from mmgcp.attention import InsertedAttention, attention_aside
from mmgcp.errors import PruningError
from mmgcp.nn.distributed import rank_share
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import prune
from mmgcp.pruning.layerwise.auxiliary.attached import average_statistics

SHARED = dict(Taylor={}, GroupFisher=dict(normalize='flops'), APoZ={}, CPSCA={}, BNScale={},
              ThiNet=dict(positions=20),
              BestOf=dict(criteria=[dict(type='mmgcp.L1Norm'), dict(type='mmgcp.Taylor')]))
# Scores alone, or also training; the networks have their initial weights
TRAINING = dict(aux_epochs=0, joint_lr=0, rounds=2, round_epochs=1, epochs=2, lr=1e-2)
JOBS = {
    **{f'{kind} {number}': dict(kind=kind, number=number, **settings)
       for kind, settings in SHARED.items() for number in (3, 1)},
    'folded': dict(kind='BNScale', number=3, compensate='fold-means'),
    'folded ThiNet': dict(kind='ThiNet', number=3, compensate='fold-means'),
    **{f'scores of {kind}': dict(kind=kind, number=3, **dict(TRAINING, rounds=1, epochs=0))
       for kind in ('DCP', 'LCP')},
    # A rank without a batch, and a step for a batch of each rank
    **{f'training of {kind}': dict(kind=kind, number=1, **TRAINING, compensate=False)
       for kind in ('DCP', 'LCP')},
    'larger batches': dict(kind='DCP', number=4, **TRAINING, compensate=False),
    # All ranks have the same batches; then their mean is that of one process
    'training of networks': dict(kind='LCP', number=2, rounds=2, epochs=2, aux_epochs=2,
                                 compensate='fold-means'),
}


class JoiningDetector(TinyDetector):
    """Its loss asks the other processes, as many heads' losses do."""

    def forward(self, images, data_samples=None, mode='tensor'):
        output = super().forward(images, data_samples, mode)
        if mode == 'tensor':
            return output
        number = reduce_mean(torch.tensor(1. + get_rank()))
        weight = len(data_samples['bboxes_labels']) * get_world_size() / number
        return dict(loss=output['loss'] * weight)


def all_batches(number):
    """Batches of two images, with fewer and fewer objects."""
    batches = make_batches(number, size=2 * SIZE)  # more values than BatchNorms remember
    return [Batch(batch.images.double(), mmyolo_samples(BOXES[:3 - position % 2].double()))
            for position, batch in enumerate(batches)]


def joined(batches):
    """Batches of four images instead of two."""
    found = []
    for first, second in zip(batches[::2], batches[1::2]):
        boxes = second.data_samples['bboxes_labels'].clone()
        boxes[:, 0] += 2
        found.append(Batch(torch.cat((first.images, second.images)), dict(
            bboxes_labels=torch.cat((first.data_samples['bboxes_labels'], boxes)),
            img_metas=[{}] * 4)))
    return found


def pruned(batches, kind, number, compensate=True, **settings):
    """Prune with some batches: the removed channels, and all that the detector has."""
    model = randomise(JoiningDetector()).double().eval()
    if kind == 'CPSCA':
        InsertedAttention({'stem': 'stem.conv', 'body': 'body.conv'},
                          {'stem': 6, 'body': 8}, num_groups=2).insert(model)
        randomise(model).double()
    torch.manual_seed(get_rank())  # all that depends on them must not depend on the rank
    amount = dict(target_flops=0.494) if kind == 'BestOf' else dict(ratio=0.4)
    with attention_aside(model):
        result = prune(
            model, **amount, input_shape=(3, SIZE, SIZE), batches=batches,
            calibration=[batch.images for batch in batches], compensate=compensate,
            criterion=dict(type=f'mmgcp.{kind}', **settings))
    return dict(removed={item.name: item.removed for item in result.plan.units},
                state=model.state_dict())


def normalised(batches):
    """A BatchNorm with the statistics of some batches, and one that has seen none."""
    norms = nn.Sequential(*(nn.BatchNorm2d(3, momentum=None).double() for _ in range(2)))
    for number, batch in enumerate(batches):
        norms[0](batch.images * (1 + number))
    average_statistics(norms)
    return norms


def on_a_rank(folder):
    """What a rank has at the end of each job, and the errors of a request without batches."""
    found = {}
    for name, job in JOBS.items():
        batches = all_batches(job['number'])
        shared = name != 'training of networks'
        found[name] = pruned(list(rank_share(batches)) if shared else batches, **job)
    found['statistics'] = normalised(rank_share(all_batches(3))).state_dict()
    for kind in ('Taylor', 'APoZ', 'ThiNet', 'DCP'):
        with pytest.raises(PruningError) as error:
            pruned([], kind, 0)
        found[f'nothing for {kind}'] = str(error.value)
    return found


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return on_ranks(__file__, 'on_a_rank', tmp_path_factory.mktemp('ranks'))


@pytest.mark.parametrize('name', JOBS)
def test_ranks_do_what_one_process_does(name, ranks):
    job = copy.deepcopy(JOBS[name])
    batches = all_batches(job['number'])
    expected = pruned(joined(batches) if name == 'larger batches' else batches, **job)
    assert sum(map(len, expected['removed'].values())) >= 4
    for rank in ranks:
        found = rank[name]
        assert found['removed'] == expected['removed']
        assert found['state'].keys() == expected['state'].keys()
        for key, value in expected['state'].items():
            torch.testing.assert_close(found['state'][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', JOBS)
def test_ranks_are_equal(name, ranks):
    first, second = (rank[name]['state'] for rank in ranks)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_statistics_of_all_ranks(ranks):
    norm = nn.BatchNorm2d(3, momentum=None).double()
    for batch, factor in zip(all_batches(3), (1, 1, 2)):  # rank 0, 1, 0
        norm(batch.images * factor)
    expected = nn.Sequential(norm, nn.BatchNorm2d(3, momentum=None).double()).state_dict()
    for rank in ranks:
        assert rank['statistics'].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(rank['statistics'][key], value)


def test_no_batches_at_all(ranks):
    for rank in ranks:
        assert 'no batches of training data' in rank['nothing for Taylor']
        assert 'no batches of training data' in rank['nothing for APoZ']
        assert 'no images' in rank['nothing for ThiNet']
        assert 'no batches' in rank['nothing for DCP']
