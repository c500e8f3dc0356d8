# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import re

import cv2
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from scripts import complaint_of, run_here

from mmgcp.analysis.plots import plot_sparsity
from mmgcp.utils.config import build_detector, load_config

TOOL = 'analysis_tools/plot_sparsity.py'


def write_run(work_dir, name, steps, share=lambda step: step / 100, **extra):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    rows = [dict(step=1, loss=3.)]
    rows += [dict(step=step, sparsity_rate=1e-3, sparsity_loss=2., sparsity_near_zero=share(step),
                  **{f'sparsity_near_zero/{key}': value for key, value in extra.items()})
             for step in steps]
    (folder / 'scalars.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder / 'scalars.json'


def tool(*arguments):
    """Run the tool in this process and return what it prints."""
    result = run_here(TOOL, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def colours(path):
    pixels = cv2.imread(str(path))[..., ::-1].reshape(-1, 3)
    return {tuple(value) for value in np.unique(pixels, axis=0).tolist()}


def palette(number):
    return tuple(round(255 * part) for part in colormaps['tab10'](number)[:3])


def test_picture_of_a_run(tmp_path):
    write_run(tmp_path, '20240101_000000', range(10, 90, 10), **{'backbone-8': .3, 'head-8': .7})
    assert tool(tmp_path) == f'written: {tmp_path}/sparsity.png\n'
    assert {palette(0), palette(1)} <= colours(tmp_path / 'sparsity.png')
    assert list(tmp_path.glob('.*')) == []


def drawn(monkeypatch, *arguments):
    """The arguments that the picture is drawn with."""
    calls = []
    monkeypatch.setattr('mmgcp.analysis.plots.plot_sparsity',
                        lambda *args: (calls.append(args), args[-1].write_text('')))
    tool(*arguments)
    return calls[0]


def test_curves_of_a_run(tmp_path, monkeypatch):
    write_run(tmp_path, '20240101_000000', [10, 20], **{'backbone-8': 0.3})
    steps, near_zero, rates, losses, _ = drawn(
        monkeypatch, tmp_path, '--out', tmp_path / 'x.png')
    assert steps == [10, 20] and rates == [1e-3] * 2 and losses == [2.] * 2
    assert near_zero == {'': [0.1, 0.2], 'backbone-8': [0.3, 0.3]}
    assert (tmp_path / 'x.png').exists()


@pytest.mark.parametrize('second, wanted', [
    ([30, 40], [0.1, 0.2, 1., 1.]), ([20, 30], [0.1, 1., 1.]), ([10, 20], [1., 1.])])
def test_resumed_and_repeated_runs(tmp_path, monkeypatch, second, wanted):
    write_run(tmp_path, '20240101_000000', [10, 20])
    write_run(tmp_path, '20240102_000000', second, share=lambda step: 1.)
    write_run(tmp_path, '20240103_000000', [])  # such as a test
    assert drawn(monkeypatch, tmp_path)[1][''] == wanted


def test_training_that_was_killed_while_writing(tmp_path, monkeypatch):
    file = write_run(tmp_path, '20240101_000000', [10, 20])
    file.write_text(file.read_text() + '{"sparsity_ne')
    assert drawn(monkeypatch, tmp_path)[0] == [10, 20]


def test_picture_of_a_checkpoint(tmp_path, write_config, monkeypatch):
    config = write_config(tmp_path / 'tiny.py')
    model = build_detector(load_config(str(config)))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, -0.5 if name.startswith('neck') else 0.005)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_3.pth')
    calls = []
    monkeypatch.setattr('mmgcp.analysis.plots.plot_score_histograms',
                        lambda *args: (calls.append(args), args[-1].write_text('')))
    tool(config, tmp_path / 'epoch_3.pth', '--near-zero-thr', '0.02')
    (scores, thresholds, _, _), = calls
    assert {'backbone-8', 'top-down-16', 'bottom-up-32', 'head-8'} <= set(scores)
    for name, values in scores.items():
        wanted = 0.5 if name.startswith(('top', 'bottom')) else 0.005
        assert values == pytest.approx([wanted] * len(values)) and len(values)
        assert thresholds[name] == 0.02
    assert sum(map(len, scores.values())) == sum(
        module.num_features for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm2d))
    assert (tmp_path / 'epoch_3-gamma.png').exists()


def test_errors(tmp_path, write_config):
    config = write_config(tmp_path / 'tiny.py')
    empty = tmp_path / 'empty'
    empty.mkdir()
    other = tmp_path / 'other'
    file = write_run(other, '20240101_000000', [])
    for arguments, wanted in (
        ((tmp_path / 'absent', ), 'there is no folder .*absent'),
        ((empty, ), 'empty has no vis_data/scalars.json'),
        ((other, ), 'no training in .*other has logged sparsity'),
        ((empty, 'x.pth'), 'empty is a folder: give either'),
        ((config, tmp_path / 'x.pth'), 'there is no checkpoint .*x.pth'),
        ((tmp_path / 'absent.py', 'x.pth'), 'there is no config .*absent.py'),
        ((empty, '--near-zero-thr', '-1'), '--near-zero-thr must be .* but is -1.0')):
        message = complaint_of(TOOL, *arguments)
        assert re.search(wanted, message), message
    file.write_text('{broken\n{}\n')
    assert 'scalars.json is damaged in line 1' in complaint_of(TOOL, other)


ROW = dict(step=10, sparsity_rate=1e-3, sparsity_loss=2., sparsity_near_zero=0.5)


@pytest.mark.parametrize('content, message', [
    (b'\x80\x02\xff', 'scalars.json is not JSON: it is no text in UTF-8'),
    (b'[1, 2]\n{}\n', r"is not the log of a training with DynamicSparsityHook: line 1 is '\[1, 2"),
    (b'"step"\n', "line 1 is '\"step\"'"),
    (json.dumps({**ROW, 'step': 'x'}).encode(), 'line 1 is'),
    (json.dumps({**ROW, 'sparsity_rate': None}).encode(), 'line 1 is'),
    (json.dumps({**ROW, 'sparsity_near_zero/a': [1]}).encode(), 'line 1 is'),
    (json.dumps(dict(sparsity_near_zero=0.5)).encode(), 'line 1 is'),
    (b'[' * 9999 + b'\n{}', 'is damaged in line 1: the line is nested too deep'),
    (json.dumps(dict(step=1)).encode(), 'no training in .* has logged sparsity')])
def test_foreign_logs(tmp_path, content, message):
    write_run(tmp_path, '20240101_000000', []).write_bytes(content)
    assert re.search(message, complaint_of(TOOL, tmp_path))
    assert not (tmp_path / 'sparsity.png').exists()


def test_what_is_refused_before_anything_is_read(tmp_path, write_config):
    config = write_config(tmp_path / 'tiny.py')
    write_run(tmp_path, '20240101_000000', [10])
    for arguments, wanted in (
        ((config, ), 'tiny.py is a file: give the checkpoint of this config behind it'),
        ((tmp_path, '--out', 'x.xyz'), r'the picture x.xyz must end in one of .*jpg, .*png'),
        ((tmp_path, '--out', 'x'), 'the picture x must end in one of'),
        ((tmp_path, '--out', tmp_path / 'no' / 'x.png'), 'there is no folder .*no for the picture'),
        ((tmp_path, '--near-zero-thr', 'nan'), '--near-zero-thr must be .* but is nan'),
        ((tmp_path, '--near-zero-thr', 'inf'), '--near-zero-thr must be .* but is inf')):
        message = complaint_of(TOOL, *arguments, cwd=tmp_path)
        assert re.search(wanted, message), message


def test_curves_have_their_places(tmp_path):
    places = []
    for share in (0.25, 0.75):
        plot_sparsity([1, 100], {'': [0., 1.], 'a': [share] * 2}, [0., 0.], [0., 0.],
                      tmp_path / 'a.png')
        image = cv2.imread(str(tmp_path / 'a.png'))[..., ::-1]
        assert image.shape == (960, 1080, 3)
        rows, columns = np.nonzero((image == palette(0)).all(-1))
        line = rows[columns < 800]  # without the legend
        assert len(line) > 500 and line.max() - line.min() < 4
        places.append(line.mean())
    assert 150 < places[0] - places[1] < 300  # upwards
