# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The folder that tools/prune.py writes to."""
import json
import os
import shutil

import pytest
import torch
from faults import root_only, small_disk
from mmengine.config import Config
from scripts import complaint_of, output_of, pruned_weights, run_here

from mmgcp.utils.folders import work_dir

OPTIONS = ('--target-params', 0.5, '--input-size', 64, 64, '--calib-batches', 0)


@pytest.fixture
def too_early(monkeypatch):
    """Pruning must not begin."""
    monkeypatch.setattr('mmgcp.utils.config.MODELS.build', lambda _: pytest.fail('begun'))


@pytest.mark.parametrize('where', ['file', 'file/deep'])
def test_file_in_its_place(config_files, too_early, tmp_path, where):
    (tmp_path / 'file').write_text('mine')
    assert complaint_of('prune.py', *config_files, '--work-dir', tmp_path / where, *OPTIONS) == (
        f'prune.py: {tmp_path}/file is a file, not a folder to write to')
    assert (tmp_path / 'file').read_text() == 'mine'


@root_only
@pytest.mark.parametrize('settings, reason', [
    ('ro', 'Read-only file system'), ('size=64k', 'No space left on device')])
def test_disk_that_cannot_be_written_to(config_files, too_early, tmp_path, settings, reason):
    """It is said before any work; 64 KB are too few for the checkpoint."""
    with small_disk(tmp_path / 'disk', settings) as disk:
        assert complaint_of('prune.py', *config_files, '--work-dir', disk / 'out', *OPTIONS) == (
            f'prune.py: {disk}/out cannot be written to: {reason}')
        assert not list(disk.iterdir())


@root_only
def test_disk_that_gets_full(config_files, pruned_folder, tmp_path, monkeypatch):
    """What is there stays."""
    with small_disk(tmp_path / 'disk', 'size=16m') as disk:
        shutil.copytree(str(pruned_folder), str(disk / 'out'))
        (disk / 'others').write_bytes(bytes(shutil.disk_usage(str(disk)).free - (100 << 10)))
        before = {path.name: path.read_bytes() for path in (disk / 'out').iterdir()}
        monkeypatch.setattr('os.posix_fallocate', lambda *_: None)  # there was space at first
        assert complaint_of('prune.py', *config_files, '--work-dir', disk / 'out', *OPTIONS) == (
            'prune.py: [Errno 28] No space left on device')
        after = {path.name: path.read_bytes() for path in (disk / 'out').iterdir()}
        assert before == after and {path.name for path in disk.iterdir()} == {'out', 'others'}


def test_second_run(config_files, too_early, tmp_path):
    with work_dir(tmp_path / 'out'):
        message = complaint_of('prune.py', *config_files, '--work-dir', tmp_path / 'out', *OPTIONS)
        assert message == f'prune.py: this process works in {tmp_path}/out already'
        assert [path.name for path in (tmp_path / 'out').iterdir()] == ['.lock']


def test_results_are_replaced(config_files, tmp_path):
    """Those of the earlier run go, other files stay."""
    out = tmp_path / 'out'
    output_of('prune.py', *config_files, '--work-dir', out, *OPTIONS)
    (out / 'log.txt').write_text('mine')
    first = pruned_weights(out)
    printed = output_of('prune.py', *config_files, '--work-dir', out, '--plan', out / 'plan.json',
                        '--no-compensate')
    assert f'written to {out}: channels.png, network.html, network.png, plan.json' in printed
    assert not (out / 'scores.png').exists() and (out / 'log.txt').read_text() == 'mine'
    assert first.keys() == pruned_weights(out).keys()
    assert any(not torch.equal(value, first[name]) for name, value in pruned_weights(out).items())
    assert not [path for path in (*out.iterdir(), *tmp_path.iterdir()) if path.name[0] == '.']


@pytest.mark.parametrize('keep', [False, True])
def test_hook_for_sparse_training(config_files, tmp_path, keep):
    """It would go on pressing the channels that stay."""
    config, checkpoint = tmp_path / 'sparse.py', config_files[1]
    config.write_text(f'_base_ = {str(config_files[0])!r}\n'
                      'custom_hooks = [*_base_.custom_hooks, '
                      "dict(type='mmgcp.DynamicSparsityHook', rate=1e-3)]\n")
    printed = output_of('prune.py', config, checkpoint, '--work-dir', tmp_path / 'out', *OPTIONS,
                        *(['--keep-hooks'] if keep else []))
    hooks = [hook['type'] for hook in Config.fromfile(tmp_path / 'out/pruned.py').custom_hooks]
    expected = [hook['type'] for hook in Config.fromfile(config).custom_hooks]
    assert hooks == (expected if keep else expected[:-1]) and hooks
    assert ('DynamicSparsityHook is not in pruned.py: ' in printed) != keep


def test_picture_that_cannot_be_drawn(config_files, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError('supplied range of [nan, nan] is not finite')

    monkeypatch.setattr('mmgcp.pruning.report.plot_score_histograms', fail)
    with pytest.warns(UserWarning, match='scores.png has not been drawn'):
        result = run_here('prune.py', *config_files, '--work-dir', tmp_path / 'out', *OPTIONS)
    assert result.returncode == 0
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['params']['after'] < report['params']['before']
    assert sorted(os.listdir(str(tmp_path / 'out'))) == [
        'channels.png', 'network.html', 'network.png', 'plan.json', 'pruned.pth', 'pruned.py',
        'report.json', 'report.md']


@pytest.mark.pictures
def test_network_that_cannot_be_drawn(config_files, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError('no font')

    monkeypatch.setattr('mmgcp.pipeline.network_drawing.plot_network', fail)
    with pytest.warns(UserWarning, match='network.png has not been drawn: ValueError: no font'):
        output_of('prune.py', *config_files, '--work-dir', tmp_path / 'out', *OPTIONS)
    names = os.listdir(str(tmp_path / 'out'))
    assert 'pruned.pth' in names and not [name for name in names if 'network' in name]
