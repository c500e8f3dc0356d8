# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/prune.py with recovery, on a small data set."""
import json

import pytest
import torch
from mmengine.config import Config
from scripts import complaint_of, output_of, pruned_weights, quickly, run_here

from mmgcp.nn.training_loss import Batch
from mmgcp.pipeline import recovery
from mmgcp.utils.config import build_detector

SETTINGS = """
prune_cfg = dict(_delete_=True, target_params=0.5, criterion=dict(type='mmgcp.L1Norm'),
                 compensate=False, recover=dict(steps=4, lr=1e-3))
"""


@pytest.fixture
def blind(monkeypatch):
    """Training data whose annotations cannot be touched."""
    class Blind(Batch):
        @property
        def data_samples(self):
            raise AssertionError('annotations have been read')

    monkeypatch.setattr('mmgcp.datasets.calibration.Batch', Blind)


def test_recovery(files, tmp_path, blind):
    """By prune_cfg and without annotations; --recover-minutes 0 turns it off."""
    output = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'recovered')
    assert 'recovery: steps 4, lr 0.001, steps done 4, difference before ' in output
    output = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'plain',
                       '--recover-minutes', 0)
    assert 'recovery:' not in output
    found = json.loads((tmp_path / 'recovered/report.json').read_text())['recovery']
    assert found['difference_after'] < found['difference_before'] and found['steps_done'] == 4
    assert json.loads((tmp_path / 'plain/report.json').read_text())['recovery'] == {}
    assert 'steps done 4' in (tmp_path / 'recovered/report.md').read_text()
    recovered, plain = (pruned_weights(tmp_path / name) for name in ('recovered', 'plain'))
    assert list(recovered) == list(plain)
    assert {key: value.shape for key, value in recovered.items()} == {
        key: value.shape for key, value in plain.items()}
    assert any(not torch.equal(value, plain[key]) for key, value in recovered.items())
    build_detector(Config.fromfile(tmp_path / 'recovered/pruned.py')).load_state_dict(recovered)


def test_minutes(files, tmp_path, monkeypatch):
    """The time of the command line counts beside the steps of the config."""
    clock = iter(range(0, 10000, 20))
    monkeypatch.setattr(recovery.time, 'monotonic', lambda: next(clock))
    output = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out',
                       '--recover-minutes', 1, '--val-images', 0)  # other processes have no clock
    assert 'recovery: minutes 1, steps 4, lr 0.001, steps done 2, difference' in output


def test_in_steps(files, tmp_path, blind, monkeypatch):
    """The detector recovers after each step, in place of a training with annotations."""
    steps, recover = [], recovery.recover

    def noted(*args, **settings):
        steps.append(settings['steps'])
        return recover(*args, **settings)

    monkeypatch.setattr(recovery, 'recover', noted)
    output = output_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out', '--steps', 2)
    assert steps == [2, 2]
    assert 'recovery: steps 4, lr 0.001, turns 2, steps done 2, difference before ' in output


@pytest.mark.parametrize('options, text', [
    (['--recover-minutes', -1],
     'minutes of the recovery must be a finite number that is not negative, but is -1'),
    (['--recover-minutes', 'nan'], 'minutes of the recovery must be a finite number'),
    (['--cfg-options', 'prune_cfg.recover.epochs=3'], "unknown option 'epochs'"),
    (['--cfg-options', 'prune_cfg.recover=3'], 'recover of prune_cfg must have the settings'),
    (['--cfg-options', 'train_dataloader.dataset.ann_file=absent.json'],
     'the calibration images cannot be loaded'),
])
def test_errors(files, tmp_path, options, text):
    assert text in complaint_of('prune.py', *quickly(files), '--work-dir', tmp_path / 'out',
                                *options)
    assert list(tmp_path.iterdir()) == []


def test_no_number(files, tmp_path):
    result = run_here('prune.py', *quickly(files), '--recover-minutes', 'three')
    assert result.returncode == 2 and "invalid float value: 'three'" in result.stderr


def test_interrupted(files, tmp_path, monkeypatch):
    """Nothing is written."""
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery._Training, '_step', interrupt)
    result = run_here('prune.py', *quickly(files), '--work-dir', tmp_path / 'out')
    assert result.returncode == 130 and 'interrupted' in result.stderr
    assert list(tmp_path.iterdir()) == []
