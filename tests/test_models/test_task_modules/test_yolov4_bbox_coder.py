# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import TASK_UTILS

from mmgcp.models import YOLOv4BBoxCoder

SCALES = {8: 1.2, 16: 1.1, 32: 1.05}


def decode_by_hand(cell, anchor, pred, stride, scale):
    """The formula of the paper and of Darknet for one box."""
    sigmoids = [1 / (1 + math.exp(-value)) for value in pred[:2]]
    center = [stride * (cell[axis] + scale * sigmoids[axis] - (scale - 1) / 2) for axis in (0, 1)]
    size = [anchor[axis] * math.exp(pred[2 + axis]) for axis in (0, 1)]
    return [center[0] - size[0] / 2, center[1] - size[1] / 2,
            center[0] + size[0] / 2, center[1] + size[1] / 2]


def make_case(number=40, seed=0):
    """Predictions of all levels with their priors, strides and boxes."""
    rng = np.random.default_rng(seed)
    strides = rng.choice(list(SCALES), number)
    cells = rng.integers(0, 20, (number, 2))
    anchors = rng.uniform(5, 200, (number, 2))
    preds = rng.normal(0, 2, (number, 4))
    centers = (cells + 0.5) * strides[:, None]
    priors = np.concatenate((centers - anchors / 2, centers + anchors / 2), axis=1)
    boxes = [decode_by_hand(*row, SCALES[row[3]])
             for row in zip(cells, anchors, preds, strides.tolist())]
    return (torch.tensor(priors), torch.tensor(preds), torch.tensor(strides),
            torch.tensor(boxes, dtype=torch.float64))


def test_tensor_strides():
    """As in inference: (1, N, 4) predictions of all levels and float strides."""
    priors, preds, strides, boxes = make_case()
    decoded = YOLOv4BBoxCoder().decode(priors[None], preds[None], strides.double())
    torch.testing.assert_close(decoded, boxes[None])


def test_single_stride():
    """As in the loss: predictions of one level."""
    priors, preds, strides, boxes = make_case(seed=1)
    for stride in SCALES:
        of_level = strides == stride
        assert of_level.sum() > 5
        decoded = YOLOv4BBoxCoder().decode(priors[of_level], preds[of_level], stride)
        torch.testing.assert_close(decoded, boxes[of_level])


def test_scales_and_strides_of_the_config():
    coder = YOLOv4BBoxCoder(scale_x_y=[2.0, 1.5], strides=[4, 64])
    prior = torch.tensor([[2., 2., 6., 10.]], dtype=torch.float64)
    pred = torch.tensor([[0.7, -0.2, 0.1, 0.3]], dtype=torch.float64)
    expected = decode_by_hand((0.5, 1.0), (4, 8), (0.7, -0.2, 0.1, 0.3), 4, 2.0)
    expected = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(coder.decode(prior, pred, 4), expected)
    torch.testing.assert_close(
        coder.decode(prior, pred, torch.tensor([4.], dtype=torch.float64)), expected)


def test_zero_is_the_anchor():
    priors = make_case()[0]
    for stride in SCALES:
        decoded = YOLOv4BBoxCoder().decode(priors, torch.zeros_like(priors), stride)
        torch.testing.assert_close(decoded, priors)


def test_reaches_beyond_the_cell():
    """What scale_x_y is for: a raw value of 3 is already past the cell's border."""
    prior = torch.tensor([[0., 0., 8., 8.]])
    box = YOLOv4BBoxCoder().decode(prior, torch.tensor([[3., -3., 0., 0.]]), 8)
    center = (box[0, :2] + box[0, 2:]) / 2
    assert center[0] > 8 and center[1] < 0


def test_gradient():
    priors, preds, strides, _ = make_case(4)
    preds.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda pred: YOLOv4BBoxCoder().decode(priors, pred, strides.double()), preds)


def test_different_lengths():
    with pytest.raises(ValueError, match='one value for each level.*1.2.*8, 16, 32'):
        YOLOv4BBoxCoder(scale_x_y=[1.2, 1.1])


def test_encode():
    with pytest.raises(NotImplementedError, match='decoded boxes'):
        YOLOv4BBoxCoder().encode()


def test_registered():
    coder = TASK_UTILS.build(ConfigDict(type='mmgcp.YOLOv4BBoxCoder', scale_x_y=[1.3],
                                        strides=[16]))
    assert isinstance(coder, YOLOv4BBoxCoder) and coder.scale_x_y == {16: 1.3}
