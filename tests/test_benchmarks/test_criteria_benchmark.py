# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of the criteria: what it runs, its tables, and its measurement of costs."""
import itertools
import json
from pathlib import Path

import pytest
from mmengine.config import Config
from scripts import ROOT

from mmgcp.utils.config import load_config

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-48e_demo-160.py'


@pytest.fixture
def root(tmp_path):
    """A data set of which only the list of images matters."""
    folder = tmp_path / 'data' / 'ImageSets' / 'Main'
    folder.mkdir(parents=True)
    for split in ('train', 'trainval'):
        (folder / f'{split}.txt').write_text('\n'.join(map(str, range(40))))
    return tmp_path / 'data'


def with_data(cfg, root):
    cfg.train_dataloader.dataset.data_root = str(root)
    return cfg


@pytest.fixture
def benchmark(load_benchmark, monkeypatch, tmp_path, root):
    """A function that runs the script with tools that only write what the real ones leave."""
    script = load_benchmark('criteria.py')
    calls, times = [], itertools.count()

    monkeypatch.setattr(script.module, 'load_config',
                        lambda path: with_data(load_config(path), root))

    def fake_run(_, tool, *arguments):
        arguments = [str(argument) for argument in arguments]
        calls.append((tool, *arguments))
        folder = Path(arguments[arguments.index('--work-dir') + 1])
        if tool == 'prune.py':
            folder.mkdir(exist_ok=True)
            (folder / 'pruned.py').write_text(f"_base_ = '{Path(arguments[0]).resolve()}'\n")
            return
        metrics = {'pascal_voc/AP50': len(calls) / 100, 'pascal_voc/mAP': len(calls) / 200}
        log = folder / f'20260101_{next(times):06}' / (
            'vis_data/scalars.json' if tool == 'train.py' else 'test.json')
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps(metrics))
        (folder / 'last_checkpoint').write_text(f'{folder}/epoch_9.pth')

    monkeypatch.setattr(script.module.Runs, 'run', fake_run)

    def run(*arguments):
        calls.clear()
        script(*arguments)
        return list(calls)

    run.arguments = (CONFIG, 'a.pth', '--work-dir', tmp_path / 'work', '--criteria', 'BNScale',
                     'L1Norm', '--remove', 0.25, 0.5, '--seeds', 0, 1)
    return run


def table(printed):
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in printed.splitlines() if line.startswith('|')]


def value(call, option):
    return call[call.index(option) + 1]


def criterion(call):
    """Type and seed in the call of the pruning tool."""
    given = dict(item.split('=') for item in call[call.index('--cfg-options') + 1:])
    return given['prune_cfg.criterion.type'], given.get('prune_cfg.criterion.seed')


def test_runs_and_table(benchmark, capsys):
    calls = benchmark(*benchmark.arguments)
    one = ['prune.py', 'test.py'] * 4 + ['train.py'] * 2
    assert [call[0] for call in calls] == one * 2
    prunings = [call for call in calls if call[0] == 'prune.py']
    assert [criterion(call) for call in prunings] == (
        [('mmgcp.BNScale', None)] * 4 + [('mmgcp.L1Norm', None)] * 4)
    assert [value(call, '--target-flops') for call in prunings[:4]] == [
        '0.75', '0.75', '0.5', '0.5']
    assert ['--no-compensate' in call for call in prunings[:4]] == [True, False] * 2
    # Tests are the even calls, of a quarter and a half, plain and compensated; then two seeds
    rows = table(capsys.readouterr().out)
    assert rows[0] == ['criterion', '-25%', '-50%', '-50%, 6 epochs']
    assert rows[2] == ['BNScale', '0.020 / 0.040', '0.060 / 0.080', '0.095 (0.090 to 0.100)']
    assert rows[3][0] == 'L1Norm' and len(rows) == 4


def test_seeds_of_criteria(benchmark, capsys):
    """With chance in it, a criterion is run with each seed, and the means are printed."""
    calls = benchmark(*benchmark.arguments[:4], '--criteria', 'ThiNet', '--remove', 0.5,
                      '--seeds', 0, 3, '--finetune-at', '--cfg-options',
                      'prune_cfg.criterion.positions=5')
    prunings = [call for call in calls if call[0] == 'prune.py']
    assert [criterion(call) for call in prunings] == [
        ('mmgcp.ThiNet', '0'), ('mmgcp.ThiNet', '0'), ('mmgcp.ThiNet', '3'), ('mmgcp.ThiNet', '3')]
    assert all(call[-1] == 'prune_cfg.criterion.positions=5' for call in prunings)
    assert len({value(call, '--work-dir') for call in prunings}) == 4
    rows = table(capsys.readouterr().out)  # tests are the calls 2, 4, 6, 8
    assert rows[2] == ['ThiNet', '0.040 (0.020 to 0.060) / 0.060 (0.040 to 0.080)']


def test_attention_is_trained_first(benchmark):
    calls = benchmark(*benchmark.arguments[:4], '--criteria', 'CPSCA', '--remove', 0.25, 0.5,
                      '--epochs', 2)
    assert [call[0] for call in calls] == ['train.py'] + ['prune.py', 'test.py'] * 4 + ['train.py']
    folder = benchmark.arguments[3]
    cfg = Config.fromfile(str(folder / 'attention.py'))
    assert cfg.model.type == 'mmgcp.SCADetector' and cfg.model.detector_type == 'YOLODetector'
    assert cfg.load_from == str(Path('a.pth').resolve()) and cfg.train_cfg.max_epochs == 2
    assert {call[1:3] for call in calls if call[0] == 'prune.py'} == {
        (str(folder / 'attention.py'), str(folder / 'attention' / 'epoch_9.pth'))}


def test_schedule_of_finetuning(benchmark):
    """It has the given epochs, and ends with the only validation."""
    benchmark(*benchmark.arguments, '--epochs', 2)
    cfg = Config.fromfile(str(benchmark.arguments[3] / 'BNScale-0.5-finetuned-1.py'))
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (2, 2)
    hook = cfg.default_hooks.param_scheduler
    tenth = 2 * 40 // cfg.train_dataloader.batch_size // 10
    assert hook.max_epochs == 2 and hook.warmup_mim_iter == tenth
    assert cfg.val_evaluator.iou_thrs[0] == 0.5 and len(cfg.val_evaluator.iou_thrs) == 10


def test_only_what_is_missing_is_run(benchmark):
    benchmark(*benchmark.arguments)
    assert benchmark(*benchmark.arguments) == []
    again = benchmark(*benchmark.arguments, '--calib-batches', 3)
    assert [call[0] for call in again].count('prune.py') == 8
    # Their accuracy differs from before, so what is trained on them does, too
    assert [call[0] for call in again].count('train.py') == 4


def test_errors(benchmark, capsys):
    with pytest.raises(SystemExit, match='give the config of a trained detector'):
        benchmark(CONFIG)
    with pytest.raises(SystemExit):
        benchmark(CONFIG, 'a.pth', '--criteria', 'Guess')
    assert 'invalid choice' in capsys.readouterr().err


@pytest.mark.slow
def test_costs(benchmark, capsys):
    """In real processes, on a small network."""
    benchmark('--cost', '--criteria', 'BNScale', 'Taylor', 'ThiNet', '--calib-batches', 1,
              '--large-config', CONFIG)
    rows = table(capsys.readouterr().out)
    assert rows[0] == ['criterion', 'needs', 'CPU s', '+ CPU s a unit', 'MiB']
    assert [row[:2] for row in rows[2:]] == [
        ['BNScale', '-'], ['Taylor', 'losses'], ['ThiNet', 'images']]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows[2:])
    assert [row[3] for row in rows[2:4]] == ['-', '-']
    number, seconds = rows[4][3].split(' x ')
    assert int(number) > 10 and float(seconds) >= 0
