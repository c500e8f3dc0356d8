# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/prune.py with criteria that go layer by layer, on a small data set."""
import json

import pytest
import torch
from mmengine.config import Config
from scripts import pruned_weights, quickly, run_here

from mmgcp.pruning.layerwise import ThiNet
from mmgcp.utils.config import build_detector, load_config

SETTINGS = """
prune_cfg = dict(
    _delete_=True,
    groups=[dict(name='last', modules=['neck.downsample_layers.1', 'neck.bottom_up_layers.1'],
                 ratio=0.5)],
    criterion=dict(type='mmgcp.ThiNet', positions=10),
    finetune=dict(epochs=1, lr=1e-2, every=2))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.5, update_buffers=True),
    dict(type='mmgcp.DynamicSparsityHook', rate=1000.)
]
"""


def tool(*arguments):
    """Run the tool in this process: its status and everything it prints."""
    result = run_here('prune.py', *arguments)
    return result.returncode, result.stdout + result.stderr


def test_interrupted_and_resumed(files, tmp_path, monkeypatch):
    """The training in between runs; the result is that of a run without interruption."""
    common = quickly(files)
    code, printed = tool(*common, '--work-dir', tmp_path / 'whole')
    assert code == 0, printed
    assert 'resuming' not in printed and 'fine-tuning' in printed

    update, calls = ThiNet.update, []

    def interrupted(self, model, unit, *args):
        calls.append(unit.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(self, model, unit, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ThiNet, 'update', interrupted)
        code, printed = tool(*common, '--work-dir', tmp_path / 'parts')
    assert code == 130 and 'interrupted' in printed
    assert [path.name for path in (tmp_path / 'parts').iterdir()] == ['unfinished.pth']
    state = torch.load(tmp_path / 'parts' / 'unfinished.pth', weights_only=False)
    assert list(state['removed']) == calls[:3]

    code, printed = tool(*common, '--work-dir', tmp_path / 'parts')
    assert code == 0, printed
    plan = json.loads((tmp_path / 'whole/plan.json').read_text())
    number = sum(bool(item['removed']) for item in plan['units'])
    assert f'resuming: 3 of {number} channel units have been pruned before' in printed
    assert plan['options']['finetune'] == dict(epochs=1, lr=0.01, every=2)
    assert plan['options']['criterion'] == dict(type='mmgcp.ThiNet', positions=10)
    names = {'pruned.py', 'pruned.pth', 'plan.json', 'report.json', 'report.md', 'channels.png',
             'network.png', 'network.html'}
    assert {path.name for path in (tmp_path / 'parts').iterdir()} == names
    first, second = pruned_weights(tmp_path / 'whole'), pruned_weights(tmp_path / 'parts')
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert plan == json.loads((tmp_path / 'parts/plan.json').read_text())

    pruned = build_detector(Config.fromfile(tmp_path / 'parts/pruned.py'))
    pruned.load_state_dict(second, strict=True)
    original = build_detector(load_config(str(files[0])))
    assert pruned.neck.downsample_layers[1].conv.out_channels == (
        original.neck.downsample_layers[1].conv.out_channels // 2)
    # the stem is not pruned, but trained
    before = torch.load(files[1], weights_only=False)['state_dict']['backbone.stem.conv.weight']
    assert not torch.equal(second['backbone.stem.conv.weight'], before)


def test_dry_run_says_what_it_does_not_know(files, tmp_path):
    code, printed = tool(*files, '--work-dir', tmp_path / 'out', '--dry-run', '--input-size', 96,
                         96)
    assert code == 0, printed
    assert 'decides layer by layer which channels they are' in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('setting, message', [
    ('prune_cfg.finetune.epoch=2', "finetune of prune_cfg has an unknown option 'epoch'"),
    ('prune_cfg.finetune.epochs=0', 'epochs of the fine-tuning must be an integer'),
    ('prune_cfg.criterion.positions=0', 'positions must be an integer'),
    ('train_cfg.by_epoch=False', 'needs a config that trains by epochs'),
    ('train_dataloader=None', 'needs a config with a train_dataloader'),
])
def test_settings_that_make_no_sense(setting, message, files, tmp_path):
    code, printed = tool(*files, '--work-dir', tmp_path / 'out', '--calib-batches', 0,
                         '--input-size', 96, 96, '--cfg-options', setting)
    assert code == 1 and message in printed and 'Traceback' not in printed
    assert list(tmp_path.iterdir()) == []
