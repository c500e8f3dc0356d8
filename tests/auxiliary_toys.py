# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A tiny detector with anchors, and data for it."""
import copy

import torch
import torch.nn as nn
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pruning_samples import Block, randomise

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.graph import find_units

SIZE = 32
CLASSES = 3
BOXES = torch.tensor([[0, 1, 4, 4, 20, 20], [1, 2, 10, 6, 30, 22], [1, 0, 0, 0, 12, 9.]])


class Head(nn.Module):
    """Has the attributes of a head that criteria read."""

    def __init__(self):
        super().__init__()
        self.num_classes = CLASSES
        self.prior_generator = AnchorGenerator([2], ratios=[1.], scales=[4.])


class TinyDetector(nn.Module):
    """Three layers, with some loss."""

    def __init__(self):
        super().__init__()
        self.stem = Block(3, 6, 3, stride=2)
        self.body = Block(6, 8, 3)
        self.pred = nn.Conv2d(8, 5, 1)
        self.bbox_head = Head()

    def extract_feat(self, images):
        return [self.body(self.stem(images))]

    def forward(self, images, data_samples=None, mode='tensor'):
        output = self.pred(*self.extract_feat(images))
        return output if mode == 'tensor' else dict(loss=(output - 1).square().mean())

    def parse_losses(self, losses):
        return sum(losses.values()), losses


def mmyolo_samples(boxes=BOXES):
    return dict(bboxes_labels=boxes.clone(), img_metas=[{}, {}])


def mmdet_samples(boxes=BOXES, size=SIZE):
    """The same objects in the format of MMDetection."""
    return [DetDataSample(
        gt_instances=InstanceData(bboxes=boxes[boxes[:, 0] == number, 2:],
                                  labels=boxes[boxes[:, 0] == number, 1].long()),
        metainfo=dict(img_shape=(size, size), pad_shape=(size, size), scale_factor=(1., 1.),
                      batch_input_shape=(size, size))) for number in range(2)]


def make_batches(number=2, samples=mmyolo_samples, size=SIZE, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return [Batch(torch.rand(2, 3, size, size, generator=generator), samples(**kwargs))
            for _ in range(number)]


def tiny_detector():
    """The detector in eval mode and its two units by name."""
    model = randomise(TinyDetector()).eval()
    return model, {item.name: item for item in find_units(model, (3, SIZE, SIZE))[0]}


def silent(stage, done, steps):
    """A progress callback that does nothing."""


def begun(criterion, model, units, batches):
    criterion.begin(model, units, batches, silent)
    return criterion


def total_loss(criterion, model, unit, batches):
    """The sum of the joint losses of all batches."""
    with criterion.joint_loss(model, unit, batches) as loss:
        return loss.mean() * len(batches)


def state_of(model):
    """Copies of all weights and statistics, with the gradients, modes and hooks beside them."""
    flags = {name: (param.requires_grad, param.grad) for name, param in model.named_parameters()}
    modes = {name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
             for name, module in model.named_modules()}
    return copy.deepcopy(model.state_dict()), flags, modes


def changed(model, before):
    """The names of the changed tensors; asserts that nothing else has changed."""
    now = state_of(model)
    assert now[1:] == before[1:] and now[0].keys() == before[0].keys()
    return [name for name, value in now[0].items() if not torch.equal(value, before[0][name])]
