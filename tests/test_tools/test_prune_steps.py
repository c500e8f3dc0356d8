# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/prune.py in several steps, on a small data set."""
import json

import pytest
import torch
from mmengine.config import Config
from scripts import complaint_of, output_of, pruned_weights, quickly, run_here

from mmgcp.pipeline.finetuning import IntermediateFinetuning
from mmgcp.pruning import PruningPlan, prune
from mmgcp.utils.config import build_detector, load_config

SETTINGS = """
prune_cfg = dict(
    _delete_=True, target_params=0.5, steps=3, criterion=dict(type='mmgcp.Taylor'),
    finetune=dict(epochs=1, lr=1e-3))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.5, update_buffers=True),
    dict(type='mmgcp.DynamicSparsityHook', rate=1000.)
]
"""


@pytest.fixture
def numbers(monkeypatch):
    """After which steps there was training."""
    found, train = [], IntermediateFinetuning.__call__

    def counted(self, model, number):
        train(self, model, number)
        found.append(number)

    monkeypatch.setattr(IntermediateFinetuning, '__call__', counted)
    return found


def test_interrupted_and_resumed(files, tmp_path, numbers, monkeypatch):
    """The result is that of a run without interruption, and its plan is one for the original."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    printed = output_of('prune.py', *quickly(files), '--work-dir', whole)
    assert numbers == [1, 2] and 'resuming' not in printed
    names = {path.name for path in whole.iterdir()}
    assert names == {'pruned.py', 'pruned.pth', 'plan.json', 'report.json', 'report.md',
                     'channels.png', 'network.png', 'network.html'}

    train = IntermediateFinetuning.__call__

    def interrupted(self, model, number):
        if number == 2:
            raise KeyboardInterrupt
        train(self, model, number)

    with monkeypatch.context() as patch:
        patch.setattr(IntermediateFinetuning, '__call__', interrupted)
        result = run_here('prune.py', *quickly(files), '--work-dir', parts)
    assert result.returncode == 130
    assert [path.name for path in parts.iterdir()] == ['unfinished.pth']
    numbers.clear()
    result = run_here('prune.py', *quickly(files), '--work-dir', parts)
    assert result.returncode == 0, result.stderr
    assert numbers == [2] and 'resuming: 1 of 3 steps have been taken before' in result.stderr
    assert {path.name for path in parts.iterdir()} == names
    first, second = pruned_weights(whole), pruned_weights(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    plan = json.loads((parts / 'plan.json').read_text())
    assert plan == json.loads((whole / 'plan.json').read_text())
    assert plan['options']['steps'] == 3
    assert plan['options']['finetune'] == dict(epochs=1, lr=1e-3, every=1)
    report = json.loads((parts / 'report.json').read_text())
    original = build_detector(load_config(str(files[0])))
    params = sum(param.numel() for param in original.parameters())
    assert report['params']['before'] == params
    assert report['params']['after'] == pytest.approx(0.5 * params, rel=0.01)
    pruned = build_detector(Config.fromfile(parts / 'pruned.py'))
    pruned.load_state_dict(second, strict=True)
    prune(original, plan=PruningPlan.load(parts / 'plan.json'), input_shape=(3, 96, 96))
    assert {name: value.shape for name, value in original.state_dict().items()} == {
        name: value.shape for name, value in second.items()}


def test_training_by_default(files, tmp_path, numbers):
    """An epoch at a tenth of the learning rate, with steps from the command line."""
    lr = load_config(str(files[0])).base_lr
    printed = output_of('prune.py', *quickly(files), '--work-dir', tmp_path, '--steps', 2,
                        '--criterion', 'BNScale', '--cfg-options', 'prune_cfg.finetune=None')
    assert numbers == [1] and 'written to' in printed
    plan = PruningPlan.load(tmp_path / 'plan.json')
    assert plan.options['finetune'] == dict(epochs=1, lr=pytest.approx(0.1 * lr), every=1)


def test_without_training(files, tmp_path, numbers):
    output_of('prune.py', *quickly(files), '--work-dir', tmp_path, '--steps', 2,
              '--cfg-options', 'prune_cfg.finetune=False', 'train_cfg.by_epoch=False')
    assert numbers == []
    options = PruningPlan.load(tmp_path / 'plan.json').options
    assert (options['steps'], options['finetune']) == (2, None)


def test_dry_run_says_what_it_does_not_know(files, tmp_path, numbers):
    printed = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out', '--dry-run')
    assert 'this is what one step would remove: 3 steps lead as far' in printed
    assert numbers == [] and list(tmp_path.iterdir()) == []


def test_plan_is_applied_in_one_go(files, tmp_path, numbers):
    model = build_detector(load_config(str(files[0])))
    prune(model, ratio=0.3, input_shape=(3, 96, 96), dry_run=True).plan.save(tmp_path / 'plan.json')
    printed = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out', '--plan',
                        tmp_path / 'plan.json', '--cfg-options', 'train_dataloader=None',
                        'prune_cfg.finetune=None', '--calib-batches', 0)
    assert numbers == [] and 'written to' in printed


@pytest.mark.parametrize('arguments, message', [
    (['--steps', 0], 'steps must be an integer from 1 to 1000, but is 0'),
    (['--cfg-options', 'prune_cfg.steps=some', 'prune_cfg.finetune=None'],
     "steps must be an integer from 1 to 1000, but is 'some'"),
    (['--criterion', 'ThiNet'], 'ThiNet cannot prune in 3 steps: it goes layer by layer'),
    (['--criterion', 'CPSCA'], 'CPSCA cannot prune in 3 steps: the attention'),
    (['--steps', 1], 'finetune is for layer-wise criteria, but mmgcp.Taylor is none'),
    (['--cfg-options', 'prune_cfg.min_keep_ratio=0.9'], 'of the parameters cannot be reached'),
    (['--cfg-options', 'prune_cfg.finetune=2'], 'finetune of prune_cfg must have the settings'),
    (['--cfg-options', 'prune_cfg.finetune.epoch=2'], "unknown option 'epoch'"),
    (['--cfg-options', 'train_cfg.by_epoch=False'],
     'needs a config that trains by epochs; prune_cfg.finetune=False does without'),
])
def test_settings_that_make_no_sense(arguments, message, files, tmp_path, numbers):
    assert message in complaint_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out',
                                   *arguments)
    assert numbers == [] and list(tmp_path.iterdir()) == []
