# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Average precision on batches, worked out by hand."""
import pytest
import torch
import torch.nn as nn
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmgcp.datasets.batch_accuracy import average_precision
from mmgcp.nn.training_loss import Batch

# Objects of two images: boxes and labels
OBJECTS = [([[2., 2., 12., 12.], [20., 4., 30., 24.]], [0, 1]), ([[5., 5., 25., 25.]], [1])]


class Finder(nn.Module):
    """Finds given boxes (x1, y1, x2, y2, label, score) in each image."""

    def __init__(self, found):
        super().__init__()
        self.found = found
        self.shapes = []

    def predict(self, images, samples, rescale):
        assert not self.training and not rescale and len(images) == len(samples)
        self.shapes += [sample.img_shape for sample in samples]
        for sample, rows in zip(samples, self.found):
            rows = torch.tensor(rows).view(-1, 6)
            sample.pred_instances = InstanceData(
                bboxes=rows[:, :4], labels=rows[:, 4].long(), scores=rows[:, 5])
        return samples


def make_batch(kind):
    images = torch.zeros(2, 3, 32, 40)
    if kind == 'rows':  # as MMYOLO's fast collating has them
        rows = [[index, label, *box] for index, (boxes, labels) in enumerate(OBJECTS)
                for box, label in zip(boxes, labels)]
        return Batch(images, dict(bboxes_labels=torch.tensor(rows), img_metas=[{}, {}]))
    samples = []
    for boxes, labels in OBJECTS:
        boxes = torch.tensor(boxes)
        samples.append(DetDataSample(gt_instances=InstanceData(
            bboxes=HorizontalBoxes(boxes) if kind == 'boxes' else boxes,
            labels=torch.tensor(labels))))
    return Batch(images, samples)


def all_objects(score=0.9):
    return [[[*box, label, score] for box, label in zip(boxes, labels)]
            for boxes, labels in OBJECTS]


@pytest.mark.parametrize('kind', ['rows', 'tensors', 'boxes'])
def test_all_objects_found(kind):
    model = Finder(all_objects()).train()
    assert average_precision(model, [make_batch(kind)]) == pytest.approx(1)
    assert model.training and model.shapes == [(32, 40)] * 2


def test_by_hand():
    """Class 0 is not found; of class 1, a box of IoU 0.75 and a better rated one of another."""
    found = all_objects()
    found[0] = [[20., 4., 30., 19., 1., 0.5]]  # 15 of 20 rows: right up to IoU 0.75
    found[1].append([0., 0., 3., 3., 1., 0.95])  # nothing is there
    # Class 1 has two objects. Sorted by score: wrong, right, and right for 6 of 10 thresholds.
    # Precisions at recall 1/2 and 1: 1/2 and 2/3, of which the greatest to the right counts.
    both, one = 2 / 3, 0.5 * 51 / 101
    expected = (0 + (6 * both + 4 * one) / 10) / 2
    assert average_precision(Finder(found), [make_batch('rows')]) == pytest.approx(expected)


def test_wrong_class_and_nothing():
    batch = make_batch('rows')
    wrong = [[[*row[:4], 2., 0.9] for row in rows] for rows in all_objects()]
    assert average_precision(Finder(wrong), [batch]) == 0
    assert average_precision(Finder([[], []]), [batch]) == 0
    nothing = Batch(batch.images, dict(bboxes_labels=torch.zeros(0, 6)))
    assert average_precision(Finder(all_objects()), [nothing]) == 0


def test_images_of_several_batches_are_told_apart():
    batch = make_batch('tensors')
    assert average_precision(Finder(all_objects()), [batch, batch]) == pytest.approx(1)
    swapped = Finder(all_objects()[::-1])
    assert average_precision(swapped, [batch, batch]) < 0.5
