# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pictures of detections, in colors that are told apart by their pixels."""
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmgcp.pipeline import pictures
from mmgcp.pipeline.pictures import GAP, WIDTH, Boxes


def pixels(image, color):
    return (image == np.array(color, np.uint8)).all(-1)


@pytest.mark.parametrize('shape', [(180, 90), (90, 180), (50, 50), (700, 900)])
def test_images_fill_their_columns(shape):
    image = np.zeros((*shape, 3), np.uint8)
    drawn = pictures._draw(image, Boxes(np.zeros((0, 4)), [], []))
    assert drawn.shape[1] == WIDTH + GAP
    assert drawn.shape[0] - GAP == round(shape[0] * WIDTH / shape[1])
    assert (drawn[:-GAP, :-GAP] == 0).all() and (drawn[:, -GAP:] == 255).all()


@pytest.mark.parametrize('corners', [[90., 60., 150., 140.], [0., 0., 30., 20.],
                                     [170., 100., 180., 180.]])
def test_texts_are_beside_their_boxes(corners):
    """Above a box, below its top where there is no room, and inside of the image."""
    image = np.zeros((180, 180, 3), np.uint8)
    boxes = np.array([corners])
    bare = pictures._draw(image, Boxes(boxes, [1], ['']))
    drawn = pictures._draw(image, Boxes(boxes, [1], ['platelet 0.87']))
    assert pixels(bare, pictures.COLORS[1]).any()
    rows, columns = np.nonzero((drawn != bare).any(-1))
    top, left = corners[1] * 2, corners[0] * 2
    assert top - 20 <= rows.min() and rows.max() <= top + 20 and rows.min() >= 0
    assert columns.max() < WIDTH and columns.min() <= left + 6
    assert pixels(drawn[rows.min():rows.max()], (255, 255, 255)).any()


def test_what_is_said_of_detections():
    result = DetDataSample(pred_instances=InstanceData(
        bboxes=torch.tensor([[0., 0., 1., 1.], [1., 1., 2., 2.], [2., 2., 3., 3.]]),
        labels=torch.tensor([1, 0, 5]), scores=torch.tensor([0.876, 0.3, 0.5])))
    found = pictures._confident(result, 0.4, ('red', 'white'))
    assert found.texts == ['white 0.88', '5 0.50'] and found.labels == [1, 5]
    assert found.corners.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
