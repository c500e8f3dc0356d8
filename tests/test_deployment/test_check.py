# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The comparison finds what differs, and forgives what rounding may decide."""
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from yolov4_samples import build, yolov4

from mmgcp.deployment.check import (
    detections_difference,
    predict,
    raw_difference,
    sample_images,
    telling_threshold,
)
from mmgcp.nn.forward import flatten_tensors

MOST = 10


class Answers:
    """A file that answers what it is told to."""

    def __init__(self, answers):
        self.answers = answers

    def run(self, images):
        return self.answers


@pytest.fixture(scope='module')
def detector(modules):
    return build(yolov4()).eval()


@pytest.fixture(scope='module')
def images(detector):
    return sample_images(detector, (2, 3, 64, 64))


@pytest.fixture
def answers(detector, images):
    found = predict(detector, images, detector.bbox_head.test_cfg)
    assert all(len(item.scores) == MOST for item in found)
    return {new: torch.stack([item[old] for item in found])
            for new, old in (('boxes', 'bboxes'), ('scores', 'scores'), ('labels', 'labels'))}


def compare(detector, images, answers):
    return detections_difference(Answers(answers), detector, images, detector.bbox_head.test_cfg)


def test_same_boxes(detector, images, answers):
    assert compare(detector, images, answers) == 0


def test_order_does_not_matter(detector, images, answers):
    assert compare(detector, images, {key: value.flip(1) for key, value in answers.items()}) == 0


def test_moved_box(detector, images, answers):
    answers['boxes'][1, 0] += 0.5
    assert 1e-3 < compare(detector, images, answers) < 0.5 + 1e-6


def test_other_score(detector, images, answers):
    answers['scores'][0, 2] += 0.125
    assert compare(detector, images, answers) >= 0.125 - 1e-6


@pytest.mark.parametrize('label', [-1, 7])
def test_missing_box(detector, images, answers, label):
    """Its counterpart is another one of its class, if there is one."""
    answers['labels'][0, 0] = label
    assert compare(detector, images, answers) > 1e-2


def test_no_boxes_at_all(detector, images, answers):
    answers['labels'][:] = -1
    assert compare(detector, images, answers) == math.inf


def test_last_box(detector, images, answers):
    """But only if its score is nearly the same; here it is not."""
    test_cfg = ConfigDict(dict(detector.bbox_head.test_cfg))
    test_cfg.max_per_img += 1
    scores = predict(detector, images, test_cfg)[0].scores
    answers['labels'][0, -1] = 7
    assert scores[-2] > scores[-1] + 2e-4
    assert compare(detector, images, answers) > 1e-2


def test_nothing_but_equal_scores(detector, images, answers, monkeypatch):
    """Which boxes are the best is not told then, but how many and how good they are."""
    found = predict(detector, images, ConfigDict(dict(detector.bbox_head.test_cfg, max_per_img=20)))
    for item in found:
        item.scores = torch.full_like(item.scores, 0.5)
    monkeypatch.setattr('mmgcp.deployment.check.predict',
                        lambda detector, images, test_cfg: found[:len(images)])
    answers['scores'][:] = 0.5
    answers['boxes'][:] = 3.
    assert compare(detector, images, answers) == 0
    answers['scores'][0, 0] = 0.6
    assert compare(detector, images, answers) >= 0.1 - 1e-6


def test_raw_outputs(detector, images):
    with torch.no_grad():
        outputs = flatten_tensors(detector(images, mode='tensor'))
    answers = {str(number): tensor.clone() for number, tensor in enumerate(outputs)}
    assert raw_difference(Answers(answers), detector, images) == 0
    answers['4'][0, 0, 0, 0] += 0.25
    largest = max(1., float(outputs[4].abs().max()))
    difference = raw_difference(Answers(answers), detector, images)
    assert 0.25 / largest - 1e-6 <= difference <= 0.25 + 1e-6
    answers['4'][0, 0, 0, 0] = math.nan
    assert raw_difference(Answers(answers), detector, images) == math.inf
    answers['4'] = answers['4'][:, 1:]
    assert raw_difference(Answers(answers), detector, images) == math.inf


def test_raw_outputs_are_relative_to_the_largest_of_a_map():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 0, 0], maps[0, 1, 0, 0] = -200., 0.5
    answer = maps.clone()
    answer[0, 0, 3, 3] += 0.01
    detector = torch.nn.Module()
    detector.forward = lambda images, mode: (maps, )
    assert raw_difference(Answers(dict(a=answer)), detector, None) == pytest.approx(0.01 / 200)
    answer[0, 1, 3, 3] += 0.01
    assert raw_difference(Answers(dict(a=answer)), detector, None) == pytest.approx(0.01)


def test_threshold_with_which_something_is_found(detector, images):
    test_cfg = ConfigDict(dict(detector.bbox_head.test_cfg))
    assert telling_threshold(detector, images, test_cfg) is None
    test_cfg.score_thr = 0.999
    lower = telling_threshold(detector, images, test_cfg)
    test_cfg.score_thr = lower
    assert 0 < lower < 0.999
    assert all(len(item.scores) for item in predict(detector, images, test_cfg))


def answer_of(boxes, scores, labels):
    return dict(boxes=boxes[None], scores=scores[None], labels=labels[None])


@pytest.mark.parametrize('number', [1, 4, 4000])
def test_rounding_of_corners_near_zero(monkeypatch, detector, images, number):
    """What is left of 150 - 149.9 is as far from the truth as 150 is: by steps of 2**-16."""
    boxes = torch.tensor([[0.1, 20., 299.9, 290.], [40., 60., 50., 70.]])
    scores, labels = torch.tensor([0.5, 0.4]), torch.tensor([1, 2])
    monkeypatch.setattr('mmgcp.deployment.check.predict', lambda *_: [
        InstanceData(bboxes=boxes, scores=scores, labels=labels)])
    moved = boxes.clone()
    moved[0, 0] += number * 2**-16
    expected = number * 2**-16 / 299.9
    found = compare(detector, images[:1], answer_of(moved, scores, labels))
    assert found == pytest.approx(expected, rel=1e-2) and (found < 1e-4) == (number < 4000)


@pytest.mark.parametrize('change, allowed', [
    (lambda boxes, scores, labels: None, True),
    (lambda boxes, scores, labels: boxes[0].add_(3), False),  # is not among the candidates
    (lambda boxes, scores, labels: labels[0].add_(1), False),
    (lambda boxes, scores, labels: scores[0].add_(0.01), False)])
def test_others_may_be_chosen_where_scores_tie(monkeypatch, detector, images, change, allowed):
    """Of two pairs of boxes that overlap, the file has those that are worse by rounding."""
    boxes = torch.tensor([[0., 0., 20., 20.], [30., 30., 50., 50.], [2., 0., 22., 20.],
                          [32., 30., 52., 50.]])
    scores, labels = torch.tensor([0.5, 0.4, 0.5 - 1e-6, 0.4 - 1e-6]), torch.tensor([1, 2, 1, 2])

    def fake_predict(_, given, test_cfg):
        best = [0, 1] if test_cfg.nms.iou_threshold < 1 else [0, 1, 2, 3]
        return [InstanceData(bboxes=boxes[best], scores=scores[best], labels=labels[best])
                for _ in given]

    monkeypatch.setattr('mmgcp.deployment.check.predict', fake_predict)
    found = [value[2:].clone() for value in (boxes, scores, labels)]
    change(*found)
    assert (compare(detector, images[:1], answer_of(*found)) < 1e-5) == allowed
