# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from mmengine.config import Config
from small_models import GROUPS, build
from yolov4_samples import yolov4


@pytest.fixture(scope='session')
def teacher_files(tmp_path_factory):
    """A config file and a checkpoint."""
    folder = tmp_path_factory.mktemp('teacher')
    config = yolov4(widen_factor=0.25)
    Config(dict(default_scope='mmyolo', model=config)).dump(folder / 'teacher.py')
    model = build(config, seed=1)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'teacher.pth')
    return dict(config=str(folder / 'teacher.py'), checkpoint=str(folder / 'teacher.pth'))


@pytest.fixture
def distiller_config(teacher_files):
    return dict(
        type='mmgcp.SpatialAttentionDistiller',
        student=yolov4(),
        teacher=dict(teacher_files),
        groups=copy.deepcopy(GROUPS))


@pytest.fixture
def distiller(distiller_config):
    return build(distiller_config)
