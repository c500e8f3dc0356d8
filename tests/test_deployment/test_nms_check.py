# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The check finds what is no result of NMS, and forgives what rounding may decide."""
import copy
import math

import pytest
import torch
from deployment_samples import Answers
from mmcv.ops import batched_nms
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmgcp.deployment.check import predict
from mmgcp.deployment.nms_check import detections_difference

MOST = 10


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
    assert compare(detector, images, answers) > 1e-2


def test_last_box(detector, images, answers):
    """But only if its score is nearly the same; here it is not."""
    test_cfg = ConfigDict(dict(detector.bbox_head.test_cfg))
    test_cfg.max_per_img += 1
    scores = predict(detector, images, test_cfg)[0].scores
    answers['labels'][0, -1] = 7
    assert scores[-2] > scores[-1] + 2e-4
    assert compare(detector, images, answers) > 1e-2


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('name', ['boxes', 'scores'])
def test_not_finite(detector, images, answers, name, value):
    answers[name][1, 3] = value
    assert compare(detector, images, answers) == math.inf


def answer_of(boxes, scores, labels):
    """And room for one more."""
    return dict(boxes=torch.cat([boxes, torch.zeros(1, 4)])[None],
                scores=torch.cat([scores, torch.zeros(1)])[None],
                labels=torch.cat([labels, torch.tensor([-1])])[None])


def fake_candidates(monkeypatch, boxes, scores, labels):
    """Let the detector have these before NMS."""
    def fake_predict(_, images, test_cfg, with_nms=True, shift=0):
        best = scores.argsort(descending=True)[:test_cfg.nms_pre]
        best = best[scores[best] > test_cfg.score_thr]
        sides = boxes[best, 2:] - boxes[best, :2]
        best = best[(sides > test_cfg.get('min_bbox_size', -1)).all(-1)]
        if with_nms and len(best):
            best = best[batched_nms(boxes[best], scores[best], labels[best], test_cfg.nms)[1]]
            best = best[:test_cfg.max_per_img]
        return [InstanceData(bboxes=(boxes[best] + shift).clamp(0, images.shape[-1] + 2 * shift),
                             scores=scores[best], labels=labels[best])]

    monkeypatch.setattr('mmgcp.deployment.nms_check.predict', fake_predict)


def changed(detector, **settings):
    test_cfg = copy.deepcopy(dict(detector.bbox_head.test_cfg))
    test_cfg['nms'].update(settings.pop('nms', {}))
    return ConfigDict(dict(test_cfg, **settings))


@pytest.mark.parametrize('number', [1, 4, 4000])
def test_rounding_of_corners_near_zero(monkeypatch, detector, images, number):
    """What is left of 150 - 149.9 is as far from the truth as 150 is: by steps of 2**-16."""
    boxes = torch.tensor([[0.1, 20., 299.9, 290.], [40., 60., 50., 62.]])
    scores, labels = torch.tensor([0.5, 0.4]), torch.tensor([1, 2])
    fake_candidates(monkeypatch, boxes, scores, labels)
    moved = boxes.clone()
    moved[0, 0] += number * 2**-16
    found = compare(detector, torch.zeros(1, 3, 320, 320), answer_of(moved, scores, labels))
    assert found == pytest.approx(number * 2**-16 / 299.9, rel=1e-2)
    assert (found < 1e-4) == (number < 4000)


@pytest.mark.parametrize('score', [0.9, 0.3, 0.002])
def test_scores_round_as_logits_do(monkeypatch, detector, images, score):
    """A sigmoid s has the derivative s (1 - s), and its logit is about log s if that is low."""
    logit = torch.tensor([score], dtype=torch.float64).logit()
    box, label = torch.tensor([[10., 20., 30., 40.]]), torch.tensor([1])
    fake_candidates(monkeypatch, box, logit.sigmoid(), label)
    found = compare(detector, images[:1], answer_of(box, (logit * 1.001).sigmoid(), label))
    assert found == pytest.approx(
        float(logit.abs() * 0.001) * (1 - score) / max(1, abs(math.log(score))), rel=2e-2)
    assert found <= 1.01e-3


PAIRS = [[1., 1., 21., 21.], [30., 30., 50., 50.],  # two pairs that overlap by 0.82
         [3., 1., 23., 21.], [32., 30., 52., 50.]]


@pytest.mark.parametrize('kept, allowed', [
    ([0, 1], True), ([2, 3], True), ([1, 2], True),
    ([0], False), ([], False),  # one is missing
    ([0, 1, 2], False)])  # two of a pair
@pytest.mark.parametrize('apart', [1e-6, 0.01])
@pytest.mark.parametrize('moved, stretched', [(0., 1.), (-10., 1.), (20., 1.), (-60., 4.)])
def test_others_may_be_kept_where_scores_tie(monkeypatch, detector, images, kept, allowed, apart,
                                             moved, stretched):
    """Also of boxes that reach out of the image, but not where they do at both ends."""
    boxes = torch.tensor(PAIRS) * stretched + moved
    scores = torch.tensor([0.5, 0.4, 0.5 - apart, 0.4 - apart])
    labels = torch.tensor([1, 2, 1, 2])
    fake_candidates(monkeypatch, boxes, scores, labels)
    answer = answer_of(boxes[kept].clamp(0, 64), scores[kept], labels[kept])
    if apart == 0.01:
        allowed = kept == [0, 1]
    assert (compare(detector, images[:1], answer) < 1e-5) == allowed


def test_box_that_reaches_out_at_both_ends(monkeypatch, detector, images):
    """Others look the same: it is not known whether it overlaps what is left out."""
    boxes = torch.tensor([[-30., 10., 90., 30.], [-35., 10., 85., 30.]])
    scores, labels = torch.tensor([0.5, 0.4]), torch.tensor([1, 1])
    fake_candidates(monkeypatch, boxes, scores, labels)
    for kept, allowed in (([0], True), ([0, 1], True), ([1], False), ([], False)):
        answer = answer_of(boxes[kept].clamp(0, 64), scores[kept], labels[kept])
        assert (compare(detector, images[:1], answer) < 1e-5) == allowed


@pytest.mark.parametrize('room, allowed', [(1, True), (2, False)])
def test_worst_box_where_there_is_no_room(monkeypatch, detector, images, room, allowed):
    """It is ``max_per_img`` that counts, not how much room the file has."""
    boxes, scores = torch.tensor(PAIRS[:2]), torch.tensor([0.5, 0.4])
    labels = torch.tensor([1, 1])
    fake_candidates(monkeypatch, boxes, scores, labels)
    answer = {name: value[:, :1] for name, value in answer_of(boxes, scores, labels).items()}
    test_cfg = changed(detector, max_per_img=room)
    difference = detections_difference(Answers(answer), detector, images[:1], test_cfg)
    assert (difference < 1e-5) == allowed


def test_worse_box_is_there_instead(monkeypatch, detector, images):
    boxes, labels = torch.tensor(PAIRS[:2]), torch.tensor([1, 1])
    for second, allowed in ((0.5 + 1e-6, True), (0.6, False)):
        scores = torch.tensor([0.5, second])
        fake_candidates(monkeypatch, boxes, scores, labels)
        answer = {name: value[:, :1] for name, value in answer_of(boxes, scores, labels).items()}
        difference = detections_difference(Answers(answer), detector, images[:1],
                                           changed(detector, max_per_img=1))
        assert (difference < 1e-5) == allowed


def test_more_boxes_than_there_may_be(monkeypatch, detector, images):
    boxes, scores = torch.tensor(PAIRS[:2]), torch.tensor([0.5, 0.4])
    labels = torch.tensor([1, 1])
    fake_candidates(monkeypatch, boxes, scores, labels)
    answer = Answers(answer_of(boxes, scores, labels))
    for room, expected in ((2, 0), (1, math.inf)):
        assert detections_difference(answer, detector, images[:1],
                                     changed(detector, max_per_img=room)) == expected


@pytest.mark.parametrize('name', ['boxes', 'scores', 'labels'])
@pytest.mark.parametrize('change', [lambda value: value[:1], lambda value: value[:, :3],
                                    lambda value: value[..., :3]])
def test_shapes(detector, images, answers, name, change):
    assert compare(detector, images, {**answers, name: change(answers[name])}) == math.inf


@pytest.mark.parametrize('change', [
    lambda boxes, scores, labels: boxes[0].add_(3),  # is not among the candidates
    lambda boxes, scores, labels: labels[0].add_(1),
    lambda boxes, scores, labels: scores[0].mul_(0.98)])
def test_what_is_no_candidate(monkeypatch, detector, images, change):
    boxes, scores = torch.tensor(PAIRS), torch.tensor([0.5, 0.4, 0.5, 0.4])
    labels = torch.tensor([1, 2, 1, 2])
    fake_candidates(monkeypatch, boxes, scores, labels)
    found = [value[:2].clone() for value in (boxes, scores, labels)]
    assert compare(detector, images[:1], answer_of(*found)) == 0
    change(*found)
    assert compare(detector, images[:1], answer_of(*found)) > 1e-2


@pytest.mark.parametrize('agnostic', [False, True])
def test_classes_that_overlap(monkeypatch, detector, images, agnostic):
    boxes, scores = torch.tensor(PAIRS[::2]), torch.tensor([0.5, 0.4])
    labels = torch.tensor([1, 2])
    fake_candidates(monkeypatch, boxes, scores, labels)
    test_cfg = changed(detector, nms=dict(class_agnostic=agnostic))
    for number in (1, 2):
        answer = answer_of(boxes[:number], scores[:number], labels[:number])
        difference = detections_difference(Answers(answer), detector, images[:1], test_cfg)
        assert (difference == 0) == ((number == 1) == agnostic)


@pytest.mark.parametrize('settings, found, allowed', [
    (dict(nms_pre=2), 2, True), (dict(nms_pre=3), 2, False),
    (dict(nms_pre=2), 3, True),  # the third nearly was among them
    (dict(nms_pre=2, min_bbox_size=7), 2, True), (dict(nms_pre=2, min_bbox_size=7), 3, True),
    (dict(min_bbox_size=9), 0, True), (dict(min_bbox_size=9), 1, False),
    (dict(score_thr=0.4), 2, True), (dict(score_thr=0.3), 2, False)])
def test_limits(monkeypatch, detector, images, settings, found, allowed):
    """The third candidate is as good as the second one, and at the limit."""
    boxes = torch.tensor([[1., 1., 9., 9.], [11., 1., 19., 9.], [21., 1., 29., 9.]])
    scores, labels = torch.tensor([0.5, 0.4 + 1e-7, 0.4]), torch.tensor([1, 1, 1])
    fake_candidates(monkeypatch, boxes, scores, labels)
    test_cfg = changed(detector, **settings)
    answer = answer_of(boxes[:found], scores[:found], labels[:found])
    difference = detections_difference(Answers(answer), detector, images[:1], test_cfg)
    assert (difference < 1e-5) == allowed


def test_all_scores_tie(monkeypatch, detector, images):
    """As of a head whose last weights are zeros: before NMS any of the boxes may be chosen."""
    boxes = torch.tensor([[12. * number, 1., 12. * number + 8, 9.] for number in range(5)])
    scores, labels = torch.full((5, ), 0.01), torch.ones(5, dtype=torch.long)
    fake_candidates(monkeypatch, boxes, scores, labels)
    answer = answer_of(boxes[4:], scores[4:], labels[4:])
    difference = detections_difference(Answers(answer), detector, images[:1],
                                       changed(detector, nms_pre=1))
    assert difference == 0


def test_low_scores_round_by_more(monkeypatch, detector, images):
    """The sigmoid of onnxruntime is wrong by 1e-7 where the score is 1e-6, too."""
    box, score, label = torch.tensor(PAIRS[:1]), torch.tensor([1e-6]), torch.tensor([1])
    fake_candidates(monkeypatch, box, score, label)
    for found, allowed in ((1.2e-6, True), (1e-3, False)):
        difference = detections_difference(
            Answers(answer_of(box, torch.tensor([found]), label)), detector, images[:1],
            changed(detector, score_thr=1e-7))
        assert (difference < 1e-5) == allowed
