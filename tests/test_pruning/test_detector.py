# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import re

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmyolo.models import YOLODetector
from mmyolo.models.layers import RepVGGBlock
from pruning_samples import choose, difference, run
from scripts import run_code
from yolov4_samples import build, yolov4

from mmgcp.errors import PruningError
from mmgcp.pruning import apply_channel_table, count_channels
from mmgcp.pruning.detector import check_channels
from mmgcp.pruning.surgery import remove_channels
from mmgcp.registry import MODELS


@pytest.fixture
def pruned(model, units):
    remove_channels(model, units, choose(units, 4))
    return model


def config(channels, **kwargs):
    content = yolov4()
    content.pop('type')
    return dict(type='mmgcp.PrunedDetector', detector='mmyolo.YOLODetector', channels=channels,
                **content, **kwargs)


def test_rebuilt_model_is_the_pruned_one(pruned):
    rebuilt = MODELS.build(config(count_channels(pruned)))
    assert type(rebuilt) is YOLODetector
    assert list(rebuilt.state_dict()) == list(pruned.state_dict())
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    assert difference(run(rebuilt), run(pruned)) == 0.


def test_table_in_a_file(pruned, tmp_path):
    """It is read when the detector is built."""
    path = tmp_path / 'pruned.py'
    content = config(str(path))
    message = f'there is no {path}.*`python tools/prune.py CONFIG CHECKPOINT --work-dir {tmp_path}`'
    with pytest.raises(PruningError, match=message):
        MODELS.build(content)
    path.write_text('model = dict(type="YOLODetector")')
    with pytest.raises(PruningError, match=f'{path} is not the config of a pruned detector'):
        MODELS.build(content)
    Config(dict(model=config(count_channels(pruned)))).dump(path)
    rebuilt = MODELS.build(content)
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    assert difference(run(rebuilt), run(pruned)) == 0.


def test_pretrained_weights_are_ignored():
    """They would have the channels of the original."""
    content = config({})
    content['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='nowhere.pth')
    before = copy.deepcopy(content)
    MODELS.build(content).init_weights()
    assert content == before


def test_check_channels():
    nested = dict(student=config('nowhere/pruned.py'))
    with pytest.raises(PruningError, match='there is no nowhere/pruned.py'):
        check_channels(nested)
    check_channels(dict(student=config({}), teacher=dict(channels='nowhere')))


def test_count_channels_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.ConvTranspose2d(4, 5, 2), nn.Flatten(), nn.Linear(6, 7))
    assert count_channels(model) == {'0': [3, 4], '1': [4], '3': [4, 5], '5': [6, 7]}


def test_apply_channel_table_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
    apply_channel_table(model, {'0': [3, 2], '1': [2], '2': [2, 5]})
    assert model[0].weight.shape == (2, 3, 1, 1) and model[2].weight.shape == (5, 2, 3, 3)
    assert model(torch.zeros(2, 3, 3, 3)).shape == (2, 5, 1, 1)


@pytest.mark.parametrize('table, message', [
    ({'backbone.stage9.conv': [1, 2]}, "'backbone.stage9.conv', which the detector does not"),
    ({'backbone.stem.conv': [3, 9]}, r"asks for \[3, 9\] channels .* has \[3, 8\] there"),
    ({'backbone.stem.conv': [3]}, r'asks for \[3\] channels'),
    ({'backbone.stem.bn': [1, 2]}, r'has \[8\] there'),
    ({'backbone.stem': [4]}, r'has \[\] there'),
])
def test_table_that_does_not_fit(table, message):
    model = build(yolov4())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message):
        apply_channel_table(model, {'backbone.stage1.0.conv': [4, 4], **table})
    assert all(value.shape == state[name].shape for name, value in model.state_dict().items())
    with pytest.raises(PruningError, match=message):
        MODELS.build(config(table))


class Kinds(nn.Module):
    """Layers of all kinds."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.grouped_up = nn.ConvTranspose2d(8, 12, 3, groups=4)
        self.depth, self.linear = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(4, 6)
        self.batch, self.group = nn.BatchNorm2d(6), nn.GroupNorm(3, 6)
        self.factor = nn.Parameter(torch.arange(6.).view(1, 6, 1, 1), requires_grad=False)
        self.vector = nn.Parameter(torch.arange(6.))
        self.scalar, self.prelu = nn.Parameter(torch.ones(1)), nn.PReLU(6)
        self.rep = RepVGGBlock(4, 6)


def test_count_channels_of_all_kinds():
    assert count_channels(Kinds()) == {
        'conv': [4, 6], 'up': [4, 6], 'grouped': [8, 12], 'grouped_up': [8, 12], 'depth': [6, 6],
        'linear': [4, 6], 'batch': [6], 'group': [6], 'factor': [6], 'vector': [6],
        'prelu.weight': [6], 'rep.rbr_dense.conv': [4, 6], 'rep.rbr_dense.bn': [6],
        'rep.rbr_1x1.conv': [4, 6], 'rep.rbr_1x1.bn': [6]}


@pytest.mark.parametrize('name, counts, expected', [
    ('conv', [3, 2], lambda old: old[:2, :3]), ('conv', [4, 1], lambda old: old[:1]),
    ('up', [3, 2], lambda old: old[:3, :2]), ('linear', [1, 6], lambda old: old[:, :1]),
    # four groups of inputs 0-1, 2-3, … and outputs 0-2, 3-5, …: the first of each stay
    ('grouped', [4, 8], lambda old: old[[0, 1, 3, 4, 6, 7, 9, 10]][:, :1]),
    ('grouped', [8, 4], lambda old: old[[0, 3, 6, 9]]),
    ('grouped_up', [4, 8], lambda old: old[[0, 2, 4, 6]][:, :2]),
    ('depth', [2, 2], lambda old: old[:2]), ('depth', [1, 1], lambda old: old[:1]),
    ('batch', [5], lambda old: old[:5]), ('group', [4], lambda old: old[:4])])
def test_layers_of_a_table(name, counts, expected):
    model = Kinds()
    layer = model.get_submodule(name)
    weight = layer.weight.detach().clone()
    others = {key: value for key, value in model.state_dict(keep_vars=True).items()
              if not key.startswith(f'{name}.')}
    apply_channel_table(model, {name: counts})
    assert torch.equal(layer.weight, expected(weight))
    assert layer.bias.shape == (counts[-1], )
    assert count_channels(model)[name] == counts
    state = model.state_dict(keep_vars=True)
    assert all(state[key] is value for key, value in others.items())
    if name not in ('batch', 'group', 'linear'):
        assert layer(torch.rand(1, counts[0], 4, 4)).shape[1] == counts[-1]
    elif name == 'group':
        assert layer.num_groups == 2 and layer(torch.rand(1, 4, 2, 2)).shape[1] == 4


@pytest.mark.parametrize('name', ['factor', 'vector'])
@pytest.mark.parametrize('count', [1, 4])
def test_parameters_of_a_table(name, count):
    model = Kinds()
    frozen = not getattr(model, name).requires_grad
    apply_channel_table(model, {name: [count]})
    parameter = getattr(model, name)
    assert parameter.flatten().tolist() == list(range(count))
    assert parameter.dim() == dict(factor=4, vector=1)[name]
    assert parameter.requires_grad != frozen


def test_attributes_of_a_table():
    model = Kinds()
    apply_channel_table(model, {f'rep.rbr_{branch}.{layer}': counts for branch in ('dense', '1x1')
                                for layer, counts in (('conv', [3, 5]), ('bn', [5]))})
    assert (model.rep.in_channels, model.rep.out_channels) == (3, 5)
    assert model.rep(torch.rand(1, 3, 4, 4)).shape[1] == 5


@pytest.mark.parametrize('name, counts, there', [
    ('conv', [4, 7], '[4, 6]'), ('conv', [4, 0], '[4, 6]'), ('conv', [-1, 6], '[4, 6]'),
    ('conv', [4.0, 6], '[4, 6]'), ('conv', ['4', 6], '[4, 6]'), ('conv', [4], '[4, 6]'),
    ('conv', [4, 6, 1], '[4, 6]'), ('up', [5, 6], '[4, 6]'), ('linear', [4, 7], '[4, 6]'),
    ('grouped', [6, 12], '[8, 12] there in 4 groups'),
    ('grouped', [8, 9], '[8, 12] there in 4 groups'),
    ('grouped', [8, 0], '[8, 12] there in 4 groups'),
    ('grouped_up', [8, 6], '[8, 12] there in 4 groups'),
    ('depth', [3, 4], '[6, 6] there in 6 groups'), ('depth', [6, 5], '[6, 6]'),
    ('batch', [0], '[6]'), ('batch', [7], '[6]'), ('batch', [6, 6], '[6]'),
    ('group', [3], '[6] there in 3 groups'), ('group', [1], '[6] there in 3 groups'),
    ('factor', [7], '[6]'), ('factor', [1, 6], '[6]'), ('vector', [0], '[6]')])
def test_layers_that_cannot_have_what_a_table_says(name, counts, there):
    model = Kinds()
    state = model.state_dict(keep_vars=True)
    message = f'asks for {counts} channels in {name!r}, but the detector has {there}'
    with pytest.raises(PruningError, match=re.escape(message)):
        apply_channel_table(model, {'rep.rbr_1x1.bn': [2], name: counts})
    assert all(state[key] is value for key, value in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize('name', ['scalar', 'rep.nonlinearity', 'prelu.bias', 'none'])
def test_names_that_a_table_cannot_have(name):
    with pytest.raises(PruningError, match=f"'{name}', which the detector|has \\[\\] there"):
        apply_channel_table(Kinds(), {name: [1]})


def test_frozen_stages_of_a_pruned_detector(pruned):
    content = config(count_channels(pruned))
    content['backbone'] = dict(content['backbone'], frozen_stages=1)
    rebuilt = MODELS.build(content)
    rebuilt.train()
    assert not any(param.requires_grad for param in rebuilt.backbone.stage1.parameters())
    assert all(param.requires_grad for param in rebuilt.backbone.stage2.parameters())


def test_building_needs_no_torch_pruning(pruned_folder):
    code = f"""
import sys
sys.modules['torch_pruning'] = None
from mmengine.config import Config
from mmgcp.utils.config import build_detector
from mmgcp.utils.checkpoint import load_strictly
model = build_detector(Config.fromfile({str(pruned_folder / 'pruned.py')!r}))
load_strictly(model, {str(pruned_folder / 'pruned.pth')!r})
print(type(model).__name__, sum(param.numel() for param in model.parameters()))
"""
    result = run_code(code)
    state = torch.load(pruned_folder / 'pruned.pth', weights_only=False)['state_dict']
    number = sum(value.numel() for name, value in state.items()
                 if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked')))
    assert result.stdout.split()[-2:] == ['YOLODetector', str(number)]
