# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What masks should say and their loss, against values worked by hand."""
import math

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmgcp.spatial.masks import (
    batch_boxes,
    below,
    focal_loss,
    kept_cells,
    mask_loss,
    mask_targets,
)
from mmgcp.spatial.settings import SpatialSettings


def test_targets():
    """Squares of three cells around the centres of small boxes, cut off at the edges."""
    boxes = torch.tensor([
        [0, 16., 8, 32, 24],  # centre (24, 16): cell (3, 2) of stride 8
        [1, 0, 0, 4, 4],  # cell (0, 0)
        [1, 0, 0, 40, 40],  # too large
        [0, 30, 38, 60, 42],  # 30 x 4, centre (45, 40): cell (5, 5), below the last row
    ])
    targets = mask_targets(boxes, (3, 5, 6), 8, 20, 3)
    assert targets.long().tolist() == [
        [[0, 0, 0, 0, 0, 0],
         [0, 0, 1, 1, 1, 0],
         [0, 0, 1, 1, 1, 0],
         [0, 0, 1, 1, 1, 0],
         [0, 0, 0, 0, 1, 1]],
        [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], *[[0] * 6] * 3],
        [[0] * 6] * 5]
    assert not mask_targets(boxes[:0], (3, 5, 6), 8, 20, 3).any()
    # The root of the area is 16, 4, 40 and sqrt(120) = 10.95
    assert mask_targets(boxes, (3, 5, 6), 8, 16, 1).sum() == 1
    assert mask_targets(boxes, (3, 5, 6), 8, 41, 7)[1].sum() == 4 * 4 + 5 * 6 - 4 * 4


def test_focal_loss():
    p = [1 / (1 + math.exp(-x)) for x in (0., 2., -1.)]
    expected = (-0.25 * (1 - p[0])**2 * math.log(p[0])
                - 0.75 * p[1]**2 * math.log(1 - p[1])
                - 0.25 * (1 - p[2])**2 * math.log(p[2])) / 3
    found = focal_loss(torch.tensor([0., 2., -1.]), torch.tensor([True, False, True]), 2., 0.25)
    assert math.isclose(float(found), expected, rel_tol=1e-6)


def test_loss():
    """The mean over two levels, each with one kept cell, times weight and images."""
    settings = SpatialSettings(window=1, box_cells=8., loss_weight=0.5)
    logits = [torch.full((2, 1, 4, 4), 1.), torch.full((2, 1, 2, 2), -1.)]
    # Stride 8 decides about 4: sides below 32; stride 16 about 8: sides below 64
    boxes = torch.tensor([[0, 0, 0, 31., 31], [1, 0, 0, 33, 33], [1, 0, 0, 65, 65]])
    p = 1 / (1 + math.exp(-1))
    kept, dropped = -0.25 * (1 - p)**2 * math.log(p), -0.75 * p**2 * math.log(1 - p)
    first = (kept + 31 * dropped) / 32
    # The centres of both boxes are in a cell of their own
    kept, dropped = -0.25 * p**2 * math.log(1 - p), -0.75 * (1 - p)**2 * math.log(p)
    second = (2 * kept + 6 * dropped) / 8
    found = mask_loss(logits, boxes, [4, 8, 16], settings)
    assert math.isclose(float(found), 0.5 * 2 * (first + second) / 2, rel_tol=1e-5)


@pytest.mark.parametrize('tau, expected', [
    (0., [False, False, False]), (0.3, [False, False, True]), (0.5, [False, True, True]),
    (1., [True, True, True])])
def test_kept_cells(tau, expected):
    """1 - sigmoid is 0.88, 0.5 and 0.12."""
    assert kept_cells(torch.tensor([-2., 0., 2.]), tau).tolist() == expected
    assert kept_cells(torch.tensor([-1e30, -math.inf]), 1.).all()


def test_below():
    keep = torch.tensor([[[[True, False], [False, True]]]])
    assert below(keep, (4, 4))[0, 0].long().tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_both_forms_of_boxes():
    boxes = [torch.tensor([[1., 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(0, 4),
             torch.tensor([[0., 0, 9, 9]])]
    samples = [DetDataSample(gt_instances=InstanceData(bboxes=kind(item)))
               for item, kind in zip(boxes, (HorizontalBoxes, HorizontalBoxes, torch.clone))]
    expected = [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [2, 0, 0, 9, 9]]
    assert batch_boxes(samples).tolist() == expected
    rows = torch.tensor([[row[0], 7, *row[1:]] for row in expected], dtype=torch.float)
    assert batch_boxes(dict(bboxes_labels=rows)).tolist() == expected
