# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Against OpenCV's own reader of Darknet networks."""
import pytest
from darknet_samples import build, tiny_config, write_darknet
from opencv_darknet import assert_agrees, needs_opencv_4

from mmgcp.darknet import checkpoint, load_parameters, model_config, read_cfg

pytestmark = needs_opencv_4


@pytest.mark.parametrize('eps', [1e-5, 1e-3])
def test_written_network(tmp_path, eps):
    model = build(tiny_config(eps), seed=1)
    assert_agrees(model, *write_darknet(model, tmp_path))


def test_read_network(tiny_files):
    cfg, weights = tiny_files
    sections = read_cfg(cfg)
    header, parameters = load_parameters(sections, weights)
    model = build(model_config(sections))
    model.load_state_dict(checkpoint(parameters, header, ['a', 'b', 'c'])['state_dict'])
    assert_agrees(model, cfg, weights)


def test_deeper_and_wider_network(tmp_path):
    model = build(tiny_config(widen_factor=0.25, deepen_factor=0.5), seed=2)
    assert_agrees(model, *write_darknet(model, tmp_path))
