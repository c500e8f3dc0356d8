# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from scripts import run_code
from tiny_runner import TinyModel, tiny_runner

from mmgcp.compatibility import version_number
from mmgcp.compatibility.checkpoints import allow_mmengine_checkpoints, checkpoint_getattr
from mmgcp.errors import UserError

weights_only_is_default = pytest.mark.skipif(
    version_number(torch.__version__) < (2, 6, 0),
    reason='torch.load reads any pickle by default before 2.6')


def test_runner_resumes_its_own_checkpoint(tmp_path):
    allow_mmengine_checkpoints()
    first = tiny_runner(tmp_path)
    first.message_hub.update_info('best_score', np.float64(0.5))
    first.message_hub.update_info('array', np.arange(3, dtype='f4'))
    first.train()
    second = tiny_runner(tmp_path, resume=True, load_from=str(tmp_path / 'epoch_1.pth'))
    second.train()
    assert second.iter == first.iter == 4
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for key in ('optimizer', 'param_schedulers', 'ema_state_dict', 'message_hub'):
        assert key in torch.load(str(tmp_path / 'epoch_1.pth'))
    np.testing.assert_array_equal(
        first.message_hub.get_scalar('train/loss').data[0],
        second.message_hub.get_scalar('train/loss').data[0])
    assert second.message_hub.get_info('best_score') == 0.5
    assert second.message_hub.get_scalar('train/loss').statistics('min') > 0


def test_load_checkpoint(tmp_path):
    allow_mmengine_checkpoints()
    runner = tiny_runner(tmp_path)
    runner.train()
    model = TinyModel()
    load_checkpoint(model, str(tmp_path / 'epoch_2.pth'))
    saved = torch.load(str(tmp_path / 'epoch_2.pth'))['state_dict']
    assert torch.equal(model.linear.weight, saved['linear.weight'])


@weights_only_is_default
def test_it_is_needed(tmp_path):
    torch.save(HistoryBuffer([1.0], [1]), str(tmp_path / 'buffer.pth'))
    load = f'import torch; torch.load({str(tmp_path / "buffer.pth")!r})'
    assert 'Weights only load failed' in run_code(load).stderr


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
@weights_only_is_default
def test_both_spellings_of_numpy(tmp_path, module):
    allow_mmengine_checkpoints()
    path = str(tmp_path / 'buffer.pth')
    torch.save(dict(buffer=HistoryBuffer([1.5, 2.5], [1, 1]), scalar=np.float32(3.5)), path)
    written = next(name for name in ('numpy._core.multiarray', 'numpy.core.multiarray')
                   if name.encode() in zipfile.ZipFile(path).read('buffer/data.pkl'))
    rewrite_pickle(path, lambda data: data.replace(written.encode(), module.encode()))
    assert module.encode() in zipfile.ZipFile(path).read('buffer/data.pkl')
    loaded = torch.load(path)
    np.testing.assert_array_equal(loaded['buffer'].data[0], [1.5, 2.5])
    assert loaded['scalar'] == 3.5


def rewrite_pickle(path, change):
    """Replace the pickle inside a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            archive.writestr(name, change(data) if name.endswith('data.pkl') else data)


def text(value):
    """The opcodes that push a str."""
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def call(function, *arguments):
    """The opcodes that call; function and arguments are opcodes, too."""
    return function + b'(' + b''.join(arguments) + b'tR'


def malicious_pickles(marker):
    """The attacks by name; each writes the marker file when a plain unpickler runs it."""
    touch, write = text(f'touch {marker}'), text(f'open({str(marker)!r}, "w")')
    # Protocol 2 writes builtins as __builtin__.
    getattr_ = b'c__builtin__\ngetattr\n'
    import_os = call(b'c__builtin__\n__import__\n', text('os'))
    history_buffer = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    init = call(getattr_, history_buffer, text('__init__'))
    globals_get = call(getattr_, call(getattr_, init, text('__globals__')), text('get'))
    sys_ = call(getattr_, call(globals_get, text('warnings')), text('sys'))
    modules_get = call(getattr_, call(getattr_, sys_, text('modules')), text('get'))
    return {
        'os.system': call(b'cos\nsystem\n', touch),
        'posix.system': call(b'cposix\nsystem\n', touch),
        'subprocess': call(b'csubprocess\ngetoutput\n', touch),
        'eval': call(b'c__builtin__\neval\n', write),
        'exec': call(b'c__builtin__\nexec\n', write),
        'getattr on os': call(call(getattr_, import_os, text('system')), touch),
        'getattr from HistoryBuffer to os': call(
            call(getattr_, call(modules_get, text('os')), text('system')), touch),
    }


ATTACKS = sorted(malicious_pickles('x'))


@pytest.mark.parametrize('attack', ATTACKS)
def test_attacks_do_attack(tmp_path, attack):
    """Proof that each attack would succeed if it were not refused."""
    marker = tmp_path / 'marker'
    pickle.load(io.BytesIO(b'\x80\x02' + malicious_pickles(marker)[attack] + b'.'))
    assert marker.exists()


@pytest.mark.parametrize('attack', ATTACKS)
@weights_only_is_default
def test_malicious_checkpoint_stays_refused(tmp_path, attack):
    allow_mmengine_checkpoints()
    marker, path = tmp_path / 'marker', str(tmp_path / 'checkpoint.pth')
    torch.save(dict(state_dict={}), path)
    rewrite_pickle(path, lambda _: b'\x80\x02' + malicious_pickles(marker)[attack] + b'.')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    with pytest.raises((pickle.UnpicklingError, UserError)):  # the latter once it is mended
        load_checkpoint(TinyModel(), path)
    assert not marker.exists()


@pytest.mark.parametrize('owner, name', [
    (os, 'system'), (HistoryBuffer, '__init__'), (HistoryBuffer, '__globals__'),
    (HistoryBuffer, '_statistics_methods'), (HistoryBuffer([1], [1]), 'mean'),
    (HistoryBuffer, 'register_statistics'), (HistoryBuffer, 'nothing'), (np, 'load')])
def test_getattr_answers_for_known_functions_alone(owner, name):
    with pytest.raises(pickle.UnpicklingError, match='is not allowed in a checkpoint'):
        checkpoint_getattr(owner, name)


@weights_only_is_default
def test_object_arrays_stay_refused(tmp_path):
    allow_mmengine_checkpoints()
    torch.save(np.array([None], dtype=object), str(tmp_path / 'array.pth'))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(str(tmp_path / 'array.pth'))
