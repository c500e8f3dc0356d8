# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The difference between a pruned model and the original, against values by hand."""
import copy

import pytest
import torch
import torch.nn as nn
from block_toys import block_net
from families import family_config
from pruning_samples import Toy, randomise, residual_toy
from yolov4_samples import build, yolov4

from mmgcp.distillation import SoftLabelLoss
from mmgcp.distillation.responses import read_responses
from mmgcp.errors import PruningError
from mmgcp.nn.forward import leave_head_out
from mmgcp.pipeline.imitation import Imitation, SoftLabels, make_imitation
from mmgcp.pruning.blocks import remove_blocks
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import gather_channels, remove_channels
from mmgcp.utils.config import build_detector

IMAGES = [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
          for seed in range(2)]


def chain():
    """Two convolutions of one tap, to compute by hand."""
    torch.manual_seed(0)
    return Toy(lambda net, x: net.pred(net.mid(x)), mid=nn.Conv2d(3, 4, 1), pred=nn.Conv2d(4, 2, 1))


def by_channel(maps):
    return maps.movedim(1, 0).flatten(1)


def test_by_hand():
    teacher = chain()
    student = Toy(teacher.run, mid=nn.Conv2d(3, 2, 1), pred=nn.Conv2d(2, 2, 1))
    removed = {('mid', 'out'): torch.tensor([1, 3]), ('pred', 'in'): torch.tensor([1, 3])}
    found = Imitation(student, teacher, removed, IMAGES)(IMAGES[1])
    read, expected = torch.cat(IMAGES), {}
    with torch.no_grad():
        for name in ('mid', 'pred'):
            read = teacher.get_submodule(name)(read)
            expected[name] = by_channel(read).var(1, unbiased=False)
        mid, student_mid = teacher.mid(IMAGES[1])[:, [0, 2]], student.mid(IMAGES[1])
        variance = expected['mid'][[0, 2]]
        reads = (by_channel(student_mid - mid).square().mean(1) / variance).mean()
        gap = student.pred(student_mid) - teacher.pred(teacher.mid(IMAGES[1]))
        predictions = (by_channel(gap).square().mean(1) / expected['pred']).mean()
    # What the first layer reads is the same
    assert found.item() == pytest.approx(float(reads / 2 + predictions), rel=1e-5)


def test_layers_of_removed_blocks_are_not_compared():
    teacher = block_net()
    with torch.no_grad():  # a branch and a channel that emit nothing
        for norm, channels in ((teacher.row[2].last.bn, slice(None)),
                               (teacher.row[0].first.bn, slice(3))):
            norm.weight[channels] = norm.bias[channels] = 0
    student = copy.deepcopy(teacher)
    remove_blocks(student, {'row.2': None})
    units, _ = find_units(student, (3, 16, 16))
    removed = {'row.0.first.conv': torch.arange(3)}
    channels = gather_channels(units, removed)
    remove_channels(student, units, removed)
    assert ('row.0.last.conv', 'in') in channels
    assert float(Imitation(student, teacher, channels, IMAGES)(IMAGES[0])) < 1e-9
    with torch.no_grad():
        student.row[1].first.conv.weight.mul_(1.5)
    assert float(Imitation(student, teacher, channels, IMAGES)(IMAGES[0])) > 1e-3


def test_kept_channels_correspond():
    """A model that lost only channels that did nothing differs in nothing."""
    teacher = residual_toy()
    units, _ = find_units(teacher, (3, 16, 16))
    removed = {unit.name: torch.tensor([0, 2]) for unit in units}
    channels = gather_channels(units, removed)
    for (name, side), gone in channels.items():
        if side == 'in':
            teacher.get_submodule(name).weight.data[:, gone] = 0
    student = copy.deepcopy(teacher)
    remove_channels(student, units, removed)
    for model in (teacher, student):
        model.eval()
    assert student.stem.conv.out_channels == 6
    imitation = Imitation(student, teacher, channels, IMAGES)
    assert imitation(IMAGES[0]).item() < 1e-10
    student.a2.conv.weight.data *= 1.5
    assert imitation(IMAGES[0]).item() > 1e-3


def test_constant_channels_of_the_original_weigh_little():
    teacher = chain()
    teacher.mid.weight.data[0] = 0
    student = copy.deepcopy(teacher)
    imitation = Imitation(student, teacher, {('pred', 'in'): torch.tensor([], dtype=torch.long)},
                          IMAGES)
    student.mid.bias.data[0] += 0.01
    assert 0 < imitation(IMAGES[0]).item() < 1


def test_errors():
    teacher, wide = chain(), Toy(chain().run, mid=nn.Conv2d(3, 4, 1), pred=nn.Conv2d(4, 3, 1))
    with pytest.raises(PruningError, match='does not predict what the original'):
        Imitation(wide, teacher, {}, IMAGES)(IMAGES[0])
    with pytest.raises(PruningError, match='layer pred of the pruned model does not read'):
        Imitation(wide, teacher, {('pred', 'in'): torch.tensor([1])}, IMAGES)


def test_detectors_are_compared_by_their_predictions():
    student, teacher = build(yolov4(), seed=1).eval(), build(yolov4(), seed=2).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    imitation = make_imitation(student, teacher, {}, [])  # which need no images to prepare with
    found = imitation(images)
    with torch.no_grad():
        predictions = [read_responses(model.bbox_head, model(images, mode='tensor'))
                       for model in (student, teacher)]
    expected = SoftLabelLoss()(*predictions)
    assert set(expected) == {f'loss_soft_label_{part}' for part in ('obj', 'cls', 'box')}
    torch.testing.assert_close(found.detach(), sum(expected.values()))
    found.backward()
    assert student.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert all(param.grad is None for param in teacher.parameters())
    assert make_imitation(teacher, teacher, {}, [])(images).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('family, kind', [
    ('yolov7-tiny', SoftLabels), ('yolov8-n', SoftLabels), ('rtmdet-tiny', SoftLabels),
    ('ppyoloe-plus-s', SoftLabels), ('yolox-nano', SoftLabels), ('retinanet-r50', Imitation),
])
def test_families(family, kind):
    """A detector does not differ from a copy, but from one with another neck."""
    teacher = randomise(build_detector(family_config(family))).eval()
    student = copy.deepcopy(teacher)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    imitation = make_imitation(student, teacher, {}, [image])
    assert type(imitation) is kind and imitation(image).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for param in student.neck.parameters():
            param.mul_(1.2)
    assert imitation(image).item() > 1e-3


def test_head_that_does_not_run():
    teacher = build(yolov4()).eval()
    leave_head_out(teacher)
    assert type(make_imitation(copy.deepcopy(teacher), teacher, {}, [
        torch.rand(1, 3, 64, 64)])) is Imitation
