# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch.nn as nn

from mmgcp.errors import UserError
from mmgcp.nn.lookup import find_module


@pytest.fixture
def model():
    return nn.ModuleDict(
        dict(backbone=nn.ModuleDict(dict(stage1=nn.ReLU(), stage2=nn.ReLU())), neck=nn.ReLU()))


def test_find_module(model):
    assert find_module(model, 'backbone.stage2') is model['backbone']['stage2']


@pytest.mark.parametrize('name, message', [
    ('backbone.stage7', "the student has no module 'backbone.stage7'; the closest names are "
                        "'backbone.stage[12]'"),
    ('xyz', "the student has no module 'xyz'; it consists of 'backbone', 'neck'"),
    ('', "the student has no module ''"),
])
def test_missing_module(model, name, message):
    with pytest.raises(UserError, match=message):
        find_module(model, name, 'student')


def test_missing_module_of_a_model_without_modules():
    with pytest.raises(UserError, match='it has no modules at all'):
        find_module(nn.ReLU(), 'conv')
