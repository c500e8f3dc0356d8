# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from mmyolo.models import YOLODetector
from pruning_samples import build, choose, difference, run, yolov4

from mmgcp.pruning import PruningError, apply_channel_table, count_channels
from mmgcp.pruning.surgery import remove_channels
from mmgcp.registry import MODELS


@pytest.fixture
def pruned(model, sets):
    remove_channels(model, sets, choose(sets, 4))
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
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True,
                            text=True, check=True)
    state = torch.load(pruned_folder / 'pruned.pth', weights_only=False)['state_dict']
    number = sum(value.numel() for name, value in state.items()
                 if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked')))
    assert result.stdout.split()[-2:] == ['YOLODetector', str(number)]
