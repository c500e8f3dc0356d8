# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The headline of GCP-SAD (arXiv 2306.01526): YOLOv4 with 20 classes at 416x416."""
from pathlib import Path

import pytest
from pruning_samples import randomise

from mmgcp.analysis import count_complexity
from mmgcp.pruning import prune
from mmgcp.utils.config import build_detector, image_size, load_config

CONFIG = Path(__file__).parents[2] / 'configs/yolov4/yolov4_fast_1xb64-50e_voc.py'


def test_parameters_and_operations_at_once():
    cfg = load_config(str(CONFIG))
    model = randomise(build_detector(cfg))
    width, height = image_size(cfg)
    result = prune(model, input_shape=(3, height, width), **cfg.prune_cfg.to_dict())
    assert result.params[0] == 64_040_001
    assert result.params[1] / result.params[0] == pytest.approx(1 - 0.647, rel=0.01)
    assert result.macs[1] / result.macs[0] == pytest.approx(1 - 0.349, rel=0.01)
    assert (result.params[1], result.macs[1]) == count_complexity(model, (3, height, width))
    assert set(result.plan.thresholds) == {
        'stride-8', 'stride-16', 'stride-32', 'top-down', 'bottom-up'}
    assert result.plan.skipped == {
        f'bbox_head.head_module.convs_pred.{level}': 'its outputs are the predictions'
        for level in range(3)}
