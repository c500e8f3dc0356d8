# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The comparison of raw outputs, and the threshold with which boxes are found in noise."""
import math

import pytest
import torch
from deployment_samples import Answers
from mmengine.config import ConfigDict

from mmgcp.deployment.check import (
    predict,
    raw_difference,
    telling_threshold,
)
from mmgcp.nn.forward import flatten_tensors


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
