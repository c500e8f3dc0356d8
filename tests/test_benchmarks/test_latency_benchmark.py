# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of what arrives of a promise: its table, going on, and the layers it names."""
import copy
from types import SimpleNamespace

import pytest
from scripts import ROOT

from mmgcp.errors import UserError

CONFIG = ROOT / 'configs' / 'yolov5' / 'yolov5_n-v61_fast_1xb16-60e_voc-320.py'
EVENT = dict(cat='Node', name='/detector/neck/top/top.0/conv/Conv_output_0_nchwc_kernel_time',
             args=dict(op_name='Conv'), dur=1500)


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    run = load_benchmark('latency.py')
    monkeypatch.setitem(run.module.CONFIGS, 'yolov5-n', str(CONFIG))
    return run


def rows(output):
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in output.splitlines() if line.startswith('|')]


def test_table_and_going_on(benchmark, tmp_path, capsys, monkeypatch):
    arguments = ('--models', 'yolov5-n', '--remove', 0.5, '--runtimes', 'torch', '--size', 64,
                 '--rounds', 2, '--work-dir', tmp_path)
    benchmark(*arguments)
    header, _, row = rows(capsys.readouterr().out)
    assert header == ['model', 'size', 'MACs', 'multiple', 'promise', 'torch']
    assert row[:2] == ['yolov5-n', '64'] and row[3] == '16' and row[2].startswith('-5')
    faster, arrived = row[5].rstrip('%)').split(' (')
    assert float(arrived) == pytest.approx(100 * float(faster) / float(row[4]), abs=1)
    monkeypatch.setattr(benchmark.module, 'measure_in', None)  # nothing is measured again
    benchmark(*arguments)
    assert rows(capsys.readouterr().out)[2] == row
    benchmark('--report', '--work-dir', tmp_path)
    assert rows(capsys.readouterr().out)[2] == row


@pytest.mark.slow
def test_onnxruntime_names_layers(benchmark, tmp_path, capsys, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.setattr(benchmark.module, 'ENOUGH', 100.)
    monkeypatch.chdir(tmp_path)
    benchmark('--models', 'yolov5-n', '--remove', 0.5, '--runtimes', 'onnxruntime', '--size', 64,
              '--rounds', 1, '--work-dir', tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (title, ) = [line for line in lines if 'of the promise' in line and line.startswith('yolov5-n')]
    layers = lines[lines.index(title) + 1:]
    assert 0 < len(layers) <= 3
    assert all(' ms, ' in line and ' channels, ' in line for line in layers)
    assert [path.name for path in tmp_path.iterdir()] == ['yolov5-n-onnxruntime-0.5-16-64']


@pytest.mark.parametrize('arguments, message', [
    ('--remove 1', 'shares of the MACs'), ('--size 100', 'multiple of 32'),
    ('--rounds 0', 'at least 1'), ('--round-to 0', 'at least 1')])
def test_wrong_arguments(benchmark, arguments, message, tmp_path):
    with pytest.raises((UserError, SystemExit), match=message):
        benchmark(*arguments.split(), '--work-dir', tmp_path)


@pytest.mark.parametrize('change, expected', [
    ({}, 'neck.top.top.0.conv'), (dict(cat='Session'), ''),
    (dict(args=dict(op_name='Concat')), ''), (dict(name='model_run'), ''),
    (dict(name='/detector/stem/Conv_kernel_time'), 'stem')])
def test_layers_of_a_profile(benchmark, change, expected):
    assert benchmark.module.layer_of(dict(EVENT, **change)) == expected


def test_paths_repeat_the_names_of_lists(benchmark):
    names = ['neck.top.0.conv', 'head.pred']
    assert benchmark.module.matching('neck.top.top.0.conv', names) == 'neck.top.0.conv'
    assert benchmark.module.matching('head.pred', names) == 'head.pred'
    assert benchmark.module.matching('other', names) == ''


def test_slow_layers_by_hand(benchmark):
    """Of 50 % of the MACs, the time that layers take beyond half of their old time."""
    before = dict(a=[4, 4], b=[4, 4], c=[4, 4])
    after = copy.deepcopy(before)
    after.update(b=[2, 2], c=[4, 2])
    result = SimpleNamespace(macs=[100, 50], channels_before=before, channels_after=after)
    found = benchmark.module.slow_layers(result, dict(a=4., b=4., c=4.), dict(a=4., b=1., c=3.))
    assert [(item['layer'], item['beyond'], item['share']) for item in found] == [
        ('a', 2., 1.), ('c', 1., 0.5)]
