# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of pruning: figures, failures, and how it ends."""
import json
import signal
import subprocess

import pytest
import torch
from scripts import ROOT

CONFIG = ROOT / 'configs' / 'yolov5' / 'yolov5_n-v61_fast_1xb16-60e_voc-320.py'
VARIANTS = ['ours', 'torch_pruning', 'compensated']


@pytest.fixture
def benchmark(load_benchmark):
    """A function that runs the script in this process, which has imported everything."""
    return load_benchmark('prune_speed.py')


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.mark.slow
def test_figures_of_a_config(benchmark, tmp_path, capsys):
    benchmark('--models', CONFIG, '--repeats', 1, '--threads', 1, '--images', 2,
              '--out', tmp_path / 'out.json')

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120 + len(CONFIG.stem)
    header, rule, row = (cells(line) for line in lines[:3])
    assert header == ['model', 'params', 'ours', 'trace/score/plan/remove', 'comp.', 'TP',
                      'TP/ours', 'mem', 'comp.', 'TP', 'left', 'TP']
    assert len(rule) == len(row) == len(header)
    assert any(line.startswith('Machine: ') and '1 threads' in line for line in lines)

    report = json.loads((tmp_path / 'out.json').read_text())
    assert set(report['machine']) == {'cpu', 'cores', 'threads', 'torch', 'torch_pruning', 'python'}
    assert (report['ratio'], report['repeats']) == (0.4, 1)
    model, = report['models']
    assert model['model'] == CONFIG.stem and model['config'] == str(CONFIG)
    assert (model['input_shape'], model['traced_shape']) == ([3, 320, 320], [3, 128, 128])
    assert model['model_bytes'] == 4 * model['params']
    assert list(model['variants']) == VARIANTS
    for variant in model['variants'].values():
        assert variant['failure'] is None
        assert variant['seconds'] == pytest.approx(sum(variant['phases'].values()))
        assert variant['peak_multiple'] > 1
        assert 0 < variant['params_left'] < model['params']
        assert len(variant['runs']) == 1
    ours, theirs, compensated = (model['variants'][name] for name in VARIANTS)
    assert model['ratio'] == pytest.approx(theirs['seconds'] / ours['seconds'])
    assert set(ours['phases']) == {'trace', 'score', 'plan', 'compensate', 'remove'}
    assert set(theirs['phases']) == {'constructor', 'step'}
    assert compensated['phases']['compensate'] > ours['phases']['compensate']
    assert ours['params_left'] == compensated['params_left']

    assert row[0] == CONFIG.stem
    assert row[1] == f'{model["params"] / 1e6:.1f} M'
    assert row[2] == f'{ours["seconds"]:.2f}'
    assert row[3] == '/'.join(f'{ours["phases"][phase]:.2f}' for phase in header[3].split('/'))
    assert row[4:7] == [f'{value:.2f}' for value in (compensated['seconds'], theirs['seconds'],
                                                     model['ratio'])]
    assert row[7:10] == [f'{item["peak_multiple"]:.1f}' for item in (ours, compensated, theirs)]
    assert row[10:] == [f'{100 * item["params_left"] / model["params"]:.0f}'
                        for item in (ours, theirs)]


def finished_run(seconds, **others):
    return dict(
        params=1000, model_bytes=4000, input_shape=[3, 64, 64], peak_reset=False,
        seconds=seconds, cpu_seconds=seconds, other_cores=0.5, phases=dict(trace=seconds),
        peak_bytes=10000, params_left=400, predictions=['head'], traced_shape=[3, 64, 64], **others)


def failed(stage, message):
    return dict(failure=dict(stage=stage, message=message))


def test_failures_are_results(benchmark, monkeypatch, capsys, tmp_path):
    """One importance crashes, the other breaks the loss, and compensation gets killed."""
    module = benchmark.module
    requests = []

    def run(request):
        requests.append((request['variant'], request.get('importance')))
        assert request['images'] == 0
        if request['variant'] == 'compensated':
            return failed('process', 'status -9')
        if request.get('importance') == 'BNScaleImportance':
            return failed('constructor', 'IndexError: list index out of range')
        if request.get('importance'):
            assert request['ignored'] == ['head'] and request['traced_shape'] == [3, 64, 64]
            return finished_run(6., **failed('loss', 'RuntimeError: sizes do not match'))
        return finished_run(2. if len(requests) == 1 else 4.)

    monkeypatch.setattr(module, 'run_in_process', run)
    benchmark('--models', 'yolov8-n', '--repeats', 2, '--out', tmp_path / 'out.json')

    assert requests == [
        ('ours', None), ('torch_pruning', 'BNScaleImportance'),
        ('torch_pruning', 'MagnitudeImportance'), ('compensated', None), ('ours', None),
        ('torch_pruning', 'MagnitudeImportance')
    ]
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 120
    assert cells(output.splitlines()[2]) == [
        'yolov8-n', '0.0 M', '3.00', '3.00/-/-/-', '- [2]', '6.00 [1]', '2.25', '2.5', '-', '2.5',
        '40', '40'
    ]
    text = ' '.join(output.split())
    assert ('[1] yolov8-n: Torch-Pruning: BNScaleImportance crashes in constructor: IndexError: '
            'list index out of range; with MagnitudeImportance it fails in loss: RuntimeError: '
            'sizes do not match') in text
    assert '[2] yolov8-n: mmgcp with compensation: fails in process: status -9' in text
    assert 'could not be reset' in text
    assert 'used 0.5 cores on average meanwhile, and 0.5 at most' in text
    variants = json.loads((tmp_path / 'out.json').read_text())['models'][0]['variants']
    assert variants['torch_pruning']['failure']['stage'] == 'loss'
    assert variants['torch_pruning']['rejected'] == [dict(
        stage='constructor', message='IndexError: list index out of range',
        importance='BNScaleImportance')]
    assert variants['compensated']['seconds'] is None


def test_the_other_importance_works(benchmark, monkeypatch, capsys):
    module = benchmark.module

    def run(request):
        if request.get('importance') == 'BNScaleImportance':
            return failed('step', 'ValueError: no scales')
        return finished_run(1.)

    monkeypatch.setattr(module, 'run_in_process', run)
    benchmark('--models', 'yolov8-n', '--repeats', 1)
    text = ' '.join(capsys.readouterr().out.split())
    assert ('[1] yolov8-n: Torch-Pruning: BNScaleImportance crashes in step: ValueError: no '
            'scales; with MagnitudeImportance it works') in text


def test_child_reports_an_exception(benchmark, capsys):
    """What the pruner raises is in the figures; Torch-Pruning has no such importance."""
    benchmark('--child', json.dumps(dict(
        config=str(CONFIG), variant='torch_pruning', threads=torch.get_num_threads(),
        traced_shape=[3, 64, 64], ignored=[], importance='NoImportance')))
    figures = json.loads(capsys.readouterr().out)
    assert 'seconds' not in figures and figures['params'] > 1e6
    assert figures['failure']['message'].startswith('AttributeError: ')
    assert 'NoImportance' in figures['failure']['message']


@pytest.mark.parametrize('arguments, message', [
    (['--models', 'yolov9'], 'there is no model or config file yolov9; the models are yolov4, '),
    (['--models', 'mmyolo::no.py'], 'mmyolo::no.py'),
    (['--repeats', '0'], '--repeats and --threads must be at least 1'),
    (['--images', '-1'], '--images must not be negative, but is -1'),
    (['--out', 'no/folder.json'], '--out no/folder.json is a folder, or in a folder that does not'),
])
def test_wrong_arguments_end_in_one_sentence(benchmark, arguments, message):
    with pytest.raises(SystemExit) as caught:
        benchmark(*arguments)
    assert caught.value.code.startswith('prune_speed.py: ')
    assert message in caught.value.code and '\n' not in caught.value.code


def test_interrupt_ends_the_child_too(benchmark, monkeypatch, capfd):
    """An interrupt while a child runs, which a timer sends instead of the keyboard."""
    children = []

    class Child(subprocess.Popen):

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            children.append(self)

    monkeypatch.setattr(subprocess, 'Popen', Child)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(SystemExit) as caught:
            benchmark('--models', 'yolov5-n')
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert caught.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1] == 'interrupted'
    child, = children
    assert child.returncode == -signal.SIGKILL  # ended and waited for
