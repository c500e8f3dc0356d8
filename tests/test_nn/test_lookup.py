# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch.nn as nn

from mmgcp.errors import UserError
from mmgcp.nn.lookup import find_module, find_modules


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


def test_find_modules(model):
    assert list(find_modules(model, 'backbone.*')) == ['backbone.stage1', 'backbone.stage2']
    assert list(find_modules(model, '*')) == [
        'backbone', 'backbone.stage1', 'backbone.stage2', 'neck'
    ]


def test_pattern_without_match(model):
    with pytest.raises(UserError, match=r"no module of the model matches 'backbone.stge\*'; "
                                         "the closest names are 'backbone"):
        find_modules(model, 'backbone.stge*')
