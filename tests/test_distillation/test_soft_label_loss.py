# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The teacher's predictions as soft labels, against values by hand."""
import pytest
import torch
from test_response import responses

from mmgcp.distillation import SoftLabelLoss
from mmgcp.distillation.responses import Responses
from mmgcp.errors import UserError
from mmgcp.registry import MODELS

LOG3 = 1.0986123  # sigmoid(log 3) = 3/4
KL = 0.1308122  # of 3/4 from 1/2: 3/4 log(3/2) + 1/4 log(1/2)


def one_image(scores, boxes, objectnesses):
    return Responses(torch.tensor([scores]), torch.tensor([boxes]),
                     None if objectnesses is None else torch.tensor([objectnesses]),
                     torch.full((len(boxes), ), 8.))


def pair(objectness):
    """Two predictions of two classes; the student is unsure of everything."""
    boxes = [[0., 0., 10., 10.], [0., 0., 10., 10.]]
    teacher = one_image([[LOG3, LOG3], [LOG3, 0.]], boxes, [LOG3, -LOG3] if objectness else None)
    boxes = [[0., 0., 5., 10.], [0., 0., 10., 2.]]  # IoU 1/2 and 1/5
    return one_image([[0., 0.], [0., 0.]], boxes, [0., 0.] if objectness else None), teacher


def test_by_hand_with_objectness():
    losses = SoftLabelLoss(dict(box=3.))(*pair(True))
    # Confidences 3/4 · 3/4 and 3/4 · 1/4, which are fewer than one object together
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss_soft_label_obj=pytest.approx(2 * KL, rel=1e-4),
        loss_soft_label_cls=pytest.approx(0.75 * 2 * KL + 0.25 * KL, rel=1e-4),
        loss_soft_label_box=pytest.approx(3 * (0.5625 * 0.5 + 0.1875 * 0.8), rel=1e-4))


def test_by_hand_without_objectness():
    losses = SoftLabelLoss()(*pair(False))
    assert {name: value.item() for name, value in losses.items()} == dict(  # 3/4 + 3/4 objects
        loss_soft_label_cls=pytest.approx(3 * KL / 1.5, rel=1e-4),
        loss_soft_label_box=pytest.approx(2 * (0.75 * 0.5 + 0.75 * 0.8) / 1.5, rel=1e-4))


def test_scores_far_below_zero_do_not_count():
    student, teacher = pair(True)
    teacher.objectnesses[:], student.objectnesses[:] = -20., -12.
    assert all(value < 1e-4 for value in SoftLabelLoss()(student, teacher).values())


@pytest.mark.parametrize('objectness', [True, False])
def test_zero_when_equal(objectness):
    for value in SoftLabelLoss()(responses(0, objectness), responses(0, objectness)).values():
        assert value.item() == pytest.approx(0, abs=1e-5)


def test_boxes_without_an_area_do_not_count():
    student, teacher = responses(0), responses(0)
    teacher.boxes[:, 1:] = student.boxes[:, 1:] = torch.tensor([5., 0., 4., 9.])
    assert SoftLabelLoss()(student, teacher)['loss_soft_label_box'].item() == pytest.approx(
        0, abs=1e-5)


def test_part_of_no_weight_is_left_out():
    losses = SoftLabelLoss(dict(box=0.))(responses(0), responses(1))
    assert set(losses) == {'loss_soft_label_cls', 'loss_soft_label_obj'}


def test_wrong_use():
    with pytest.raises(UserError, match=r"but has \['boxes'\]"):
        MODELS.build(dict(type='mmgcp.SoftLabelLoss', weights=dict(boxes=1.)))
    with pytest.raises(UserError, match='both have objectnesses or both have none'):
        SoftLabelLoss()(responses(0), responses(1, False))
