# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of the recipes: which trainings it starts with which configs, and its tables."""
import itertools
import json
from pathlib import Path

import pytest
from scripts import ROOT

from mmgcp.errors import UserError
from mmgcp.utils.config import build_detector, load_config

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-48e_demo-160.py'
NAMES = ['baseline', 'two_phase-0.008', 'constant-0.008']


@pytest.fixture
def benchmark(load_benchmark, monkeypatch, tmp_path):
    """A function that runs the script with trainings that only write what training leaves."""
    script = load_benchmark('training_recipes.py')
    calls = []
    times = itertools.count()

    def fake_run(_, tool, *arguments):
        arguments = [str(argument) for argument in arguments]
        calls.append((tool, *arguments))
        if len(calls) == run.fails_at:
            raise UserError(f'{tool} failed')
        folder = Path(arguments[arguments.index('--work-dir') + 1])
        metrics = {'pascal_voc/AP50': len(calls) / 100, 'pascal_voc/mAP': len(calls) / 200}
        if tool == 'prune.py':
            folder.mkdir(exist_ok=True)
            base = f"_base_ = '{arguments[0]}'\n"
            (folder / 'pruned.py').write_text(base + "load_from = 'pruned.pth'\n")
            return
        log = folder / f'20260101_{next(times):06}' / (
            'vis_data/scalars.json' if tool == 'train.py' else 'test.json')
        log.parent.mkdir(parents=True)
        lines = [dict(sparsity_near_zero=0.1), dict(sparsity_near_zero=0.6), metrics]
        log.write_text('\n'.join(map(json.dumps, lines if tool == 'train.py' else [metrics])))
        (folder / 'last_checkpoint').write_text(f'{folder}/epoch_9.pth')

    monkeypatch.setattr(script.module.Runs, 'run', fake_run)

    def run(*arguments):
        calls.clear()
        script('--config', CONFIG, '--work-dir', tmp_path / 'work', *arguments)
        return list(calls)

    run.fails_at = None
    return run


def test_runs_and_tables(benchmark, tmp_path, capsys):
    calls = benchmark('--seeds', 0, 1)
    # Tools in their order: the baseline, two schedules, and four recipes with two seeds
    assert [call[0] for call in calls] == ['train.py', *['train.py', 'prune.py', 'test.py'] * 2,
                                           *['train.py'] * 8]
    assert [Path(call[1]).stem for call in calls if call[0] == 'train.py'][:3] == NAMES
    seeds = [call[-1] for call in calls if call[0] == 'train.py']
    assert seeds[3:] == ['randomness.seed=0'] * 4 + ['randomness.seed=1'] * 4
    printed = capsys.readouterr().out
    assert 'Baseline: mAP50 0.010, mAP 0.005' in printed
    # The trainings were calls 2 and 5, the tests after pruning 4 and 7
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in printed.splitlines() if line.startswith('|')]
    assert ['two_phase', '0.008', '60.0%', '0.020 / 0.010', '0.040 / 0.020'] in rows
    assert ['constant', '0.008', '60.0%', '0.050 / 0.025', '0.070 / 0.035'] in rows
    assert ['fine-tuning', '-', '12', '0.100 / 0.050', '0.080, 0.120', '0.040, 0.060'] in rows
    assert ['+ channel-wise', '1', '12', '0.130 / 0.065', '0.110, 0.150', '0.055, 0.075'] in rows


def test_configs(benchmark, tmp_path):
    benchmark('--epochs', 5, '--sparse-epochs', 7)
    folder = tmp_path / 'work'
    sparse = load_config(str(folder / 'two_phase-0.008.py'))
    hook = sparse.custom_hooks[-1]
    assert (hook.type, hook.rate, hook.schedule) == (
        'mmgcp.DynamicSparsityHook', 0.008, dict(type='two_phase'))
    assert sparse.train_cfg.max_epochs == sparse.default_hooks.param_scheduler.max_epochs == 7
    assert sparse.load_from == str(folder / 'baseline' / 'epoch_9.pth')
    tuned = load_config(str(folder / 'finetune-1-0.py'))
    assert tuned.train_cfg.max_epochs == tuned.default_hooks.param_scheduler.max_epochs == 5
    assert tuned.model.type == 'YOLODetector' and tuned.load_from == 'pruned.pth'
    # What is trained on must not be sparse-trained any more
    assert 'DynamicSparsityHook' not in tuned.pretty_text
    for recipe in ('attention', 'response', 'cwd'):
        cfg = load_config(str(folder / f'{recipe}-1-0.py'))
        assert cfg.model.teacher == dict(
            config=str(folder / 'baseline.py'), checkpoint=sparse.load_from)
        assert cfg.model.student == tuned.model and cfg.train_cfg == tuned.train_cfg
    build_detector(tuned)


def test_weight_of_distilling(benchmark, tmp_path):
    benchmark()
    calls = benchmark('--distill-weight', 0.1)  # of which plain fine-tuning has none
    assert [Path(call[1]).stem for call in calls] == [
        'attention-0.1-0', 'response-0.1-0', 'cwd-0.1-0']
    models = [load_config(call[1]).model for call in calls]
    assert [group.weight for group in models[0].groups] == pytest.approx([10., 0.1])
    assert set(models[1].response.weights.values()) == {0.1}
    assert models[2].groups[0].weight == 0.1


def test_only_what_is_missing_is_run(benchmark, tmp_path, capsys):
    benchmark.fails_at = 5  # of the second schedule
    with pytest.raises(SystemExit):
        benchmark()
    benchmark.fails_at = None
    # After an interruption
    assert [Path(call[1]).stem for call in benchmark() if call[0] == 'train.py'] == [
        'constant-0.008', 'finetune-1-0', 'attention-1-0', 'response-1-0', 'cwd-1-0']
    assert benchmark() == []
    # With more seeds, and with other epochs, which stand in a row of their own
    assert len(benchmark('--seeds', 0, 3, '--steps', 'recipes')) == 4
    capsys.readouterr()
    assert len(benchmark('--epochs', 3, '--recipes', 'cwd')) == 1
    rows = [line.split('|')[1:4] for line in capsys.readouterr().out.splitlines()
            if line.startswith('| + channel-wise')]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ['+ channel-wise', '1', '3'], ['+ channel-wise', '1', '12']]
