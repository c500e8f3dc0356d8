# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch

from mmgcp.errors import UserError
from mmgcp.utils.detectors import load_detector


def test_detector_with_its_weights(config_files):
    config, checkpoint = map(str, config_files)
    options = {'model.test_cfg.score_thr': 0.25}
    model, cfg, meta = load_detector(config, checkpoint, options)
    assert not model.training and options == {'model.test_cfg.score_thr': 0.25}
    assert model.bbox_head.test_cfg.score_thr == cfg.model.test_cfg.score_thr == 0.25
    assert meta['dataset_meta']['classes'] == ('Platelets', 'RBC', 'WBC')
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_does_not_fit(config_files):
    config, checkpoint = map(str, config_files)
    with pytest.raises(UserError, match='does not fit'):
        load_detector(config, checkpoint, {'model.bbox_head.head_module.num_classes': 4})
