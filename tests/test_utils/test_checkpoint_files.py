# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import os

import pytest
import torch
from faults import root_only, small_disk, write_training

from mmgcp.errors import UserError
from mmgcp.utils.checkpoint_files import newest_checkpoint, save_checkpoint, training_bytes


def test_size_of_the_checkpoint_of_a_training(tmp_path):
    """As that of an optimizer with momentum, of what is not frozen."""
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 3), torch.nn.BatchNorm2d(64),
                                torch.nn.Conv2d(64, 64, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad],
                                lr=0.1, momentum=0.9)
    model(torch.ones(1, 16, 8, 8)).sum().backward()
    optimizer.step()
    save_checkpoint(dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict()),
                    tmp_path / 'a.pth')
    size = (tmp_path / 'a.pth').stat().st_size
    assert 0.95 * size < training_bytes(model) < size


@pytest.mark.parametrize('files, newest', [
    ({}, None),
    ({'other.pth': 'whole', 'best_mAP_epoch_1.pth': 'whole'}, None),
    ({'epoch_1.pth': 'whole'}, 'epoch_1.pth'),
    ({'epoch_9.pth': 'whole', 'epoch_10.pth': 'whole', 'last_checkpoint': 'epoch_9.pth'},
     'epoch_10.pth'),
    ({'iter_50.pth': 'whole', 'iter_100.pth': 'cut', 'last_checkpoint': 'iter_100.pth'},
     'iter_50.pth'),
    ({'epoch_1.pth': 'whole', 'epoch_2.pth': 'bare'}, 'epoch_1.pth'),
    ({'epoch_2.pth': 'whole', 'last_checkpoint': 'epoch_1.pth'}, 'epoch_2.pth'),
    ({'mine.pth': 'whole', 'last_checkpoint': 'mine.pth'}, 'mine.pth'),
    ({'epoch_300.pth': 'whole', 'epoch_3.pth': 'whole'}, 'epoch_3.pth')])
def test_newest(tmp_path, files, newest):
    """By time, since a longer training may have left files with higher numbers."""
    write_training(tmp_path, files)
    assert newest_checkpoint(tmp_path) == (newest and str(tmp_path / newest))


@pytest.mark.parametrize('files, reason', [
    ({'epoch_2.pth': 'cut', 'last_checkpoint': 'epoch_1.pth'}, '{0}/epoch_2.pth cannot be read'),
    ({'epoch_1.pth': 'bare'}, '{0}/epoch_1.pth has no optimizer')])
def test_none_is_whole(tmp_path, files, reason):
    write_training(tmp_path, files)
    with pytest.raises(UserError) as caught:
        newest_checkpoint(tmp_path)
    assert str(caught.value).startswith(f'no checkpoint in {tmp_path} is whole: ')
    assert reason.format(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_what_was_passed_over_is_said(tmp_path, capsys):
    write_training(tmp_path, {'epoch_1.pth': 'whole', 'epoch_2.pth': 'cut'})
    newest_checkpoint(tmp_path)
    (line, ) = capsys.readouterr().out.splitlines()
    assert line.startswith(f'{tmp_path}/epoch_1.pth is the newest checkpoint that is whole: ')
    assert f'{tmp_path}/epoch_2.pth cannot be read' in line


@pytest.mark.parametrize('text', ['', '\0', '/' * 5000, 'epoch_1.pth\n\n', 'x\ny'])
def test_marker_that_was_not_written_to_its_end(tmp_path, text):
    write_training(tmp_path, {'epoch_1.pth': 'whole'})
    (tmp_path / 'last_checkpoint').write_text(text)
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


def test_only_one_was_deleted(tmp_path, capsys):
    """As with max_keep_ckpts=1, before the next one is written."""
    write_training(tmp_path, {'last_checkpoint': 'epoch_1.pth'})
    assert newest_checkpoint(tmp_path) is None
    assert capsys.readouterr().out == (
        f'{tmp_path}/epoch_1.pth, which {tmp_path}/last_checkpoint names, does not exist\n')


@pytest.mark.parametrize('since, newest', [
    (0, 'epoch_300.pth'), (2, 'epoch_300.pth'), (3, None)])
def test_older_files_do_not_count(tmp_path, capsys, since, newest):
    write_training(tmp_path, {'epoch_1.pth': 'cut', 'epoch_2.pth': 'whole', 'epoch_300.pth':
                              'whole', 'last_checkpoint': 'epoch_300.pth'})
    found = newest_checkpoint(tmp_path, since=int((1e9 + since) * 1e9))
    assert found == (newest and str(tmp_path / newest)) and not capsys.readouterr().out


def test_save(tmp_path):
    save_checkpoint(dict(weight=torch.arange(3)), tmp_path / 'a.pth')
    found = torch.load(str(tmp_path / 'a.pth'))
    assert torch.equal(found['weight'], torch.arange(3))


def test_save_where_nothing_can_be_written(tmp_path):
    with pytest.raises(OSError) as caught:
        save_checkpoint({}, tmp_path / 'absent' / 'a.pth')
    assert isinstance(caught.value, FileNotFoundError)


@root_only
def test_save_on_a_full_disk(tmp_path):
    """torch's own writer raises a RuntimeError about a C++ file."""
    with small_disk(tmp_path / 'disk', 'size=64k') as disk:
        with pytest.raises(OSError) as caught:
            save_checkpoint(dict(weight=torch.zeros(1 << 18)), disk / 'a.pth')
    assert caught.value.strerror == os.strerror(28)
