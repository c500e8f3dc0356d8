# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import io
import os
import pickle
import subprocess
import sys
import zipfile
from importlib import metadata

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint

from mmgcp import compatibility

GOOD = dict(torch='2.13.0+cpu', mmengine='0.10.7', mmcv='2.0.1', mmdet='3.3.0', mmyolo='0.6.0')
weights_only_is_default = pytest.mark.skipif(
    compatibility._version_number(torch.__version__) < (2, 6, 0),
    reason='torch.load reads any pickle by default before 2.6')


class TinyModel(BaseModel):

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(inputs).square().mean())


def tiny_runner(work_dir, **kwargs):
    return Runner(
        TinyModel(),
        work_dir=str(work_dir),
        train_dataloader=torch.utils.data.DataLoader(
            [dict(inputs=torch.ones(2))] * 4, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=3, by_epoch=False),
            dict(type='CosineAnnealingLR', T_max=2, by_epoch=True),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=9, by_epoch=False),
        ],
        custom_hooks=[dict(type='EMAHook', ema_type='ExponentialMovingAverage')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        experiment_name=str(work_dir).replace('/', '_') + str(len(kwargs)),
        **kwargs)


@pytest.fixture
def installed(monkeypatch):
    """A dict of the versions that importlib.metadata will report."""
    versions = dict(GOOD)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, 'version', version)
    return versions


def test_good_versions_pass(installed):
    compatibility.check_versions()


@pytest.mark.parametrize('name, version, wanted', [
    ('torch', '1.12.1+cu113', 'torch>=1.13'),
    ('mmengine', '0.7.0', 'mmengine>=0.7.1,<1.0.0'),
    ('mmengine', '1.0.0', 'mmengine>=0.7.1,<1.0.0'),
    ('mmcv', '2.1.0', 'mmcv>=2.0.0,<2.1.0'),
    ('mmcv', '1.7.1', 'mmcv>=2.0.0,<2.1.0'),
    ('mmdet', '2.28.2', 'mmdet>=3.0.0,<4.0.0'),
    ('mmyolo', '0.4.0', 'mmyolo>=0.5.0,<1.0.0'),
])
def test_wrong_version_is_named(installed, name, version, wanted):
    installed[name] = version
    with pytest.raises(ImportError) as error:
        compatibility.check_versions()
    assert str(error.value) == f'mmgcp needs {wanted}, but {name} {version} is installed.'


@pytest.mark.parametrize('name, version', [('mmcv', '2.0.0'), ('torch', '1.13'),
                                           ('mmengine', '0.10.10'), ('mmdet', '3.10.0')])
def test_edges_pass(installed, name, version):
    installed[name] = version
    compatibility.check_versions()


@pytest.mark.parametrize('name', list(GOOD))
def test_missing_package_is_named(installed, monkeypatch, name):
    del installed[name]
    find_spec = compatibility.util.find_spec
    monkeypatch.setattr(compatibility.util, 'find_spec',
                        lambda module: None if module == name else find_spec(module))
    with pytest.raises(ImportError, match=f'mmgcp needs {name}>=.* {name} is not installed'):
        compatibility.check_versions()


def test_module_version_stands_in_for_metadata(installed):
    del installed['mmengine']
    compatibility.check_versions()


def test_mmcv_lite_is_named(installed):
    del installed['mmcv']
    installed['mmcv-lite'] = '2.0.1'
    with pytest.raises(ImportError, match='mmcv-lite 2.0.1 has none'):
        compatibility.check_versions()


def test_mmcv_without_ops_is_named(installed, monkeypatch):
    monkeypatch.setattr(compatibility.machinery.PathFinder, 'find_spec', lambda *args: None)
    with pytest.raises(ImportError, match=r'mmcv 2.0.1 has none \(mmcv._ext is missing\)'):
        compatibility.check_versions()


def test_user_sees_our_error_not_mmyolos(tmp_path):
    (tmp_path / 'mmcv-2.2.0.dist-info').mkdir()
    (tmp_path / 'mmcv-2.2.0.dist-info' / 'METADATA').write_text('Name: mmcv\nVersion: 2.2.0\n')
    root = os.path.dirname(os.path.dirname(compatibility.__file__))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), root]))
    run = subprocess.run([sys.executable, '-c', 'import mmgcp'], env=environment,
                         stderr=subprocess.PIPE, universal_newlines=True)
    assert run.stderr.splitlines()[-1] == (
        'ImportError: mmgcp needs mmcv>=2.0.0,<2.1.0, but mmcv 2.2.0 is installed.')


def test_runner_resumes_its_own_checkpoint(tmp_path):
    compatibility.allow_mmengine_checkpoints()
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
    compatibility.allow_mmengine_checkpoints()
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
    run = subprocess.run([sys.executable, '-c', load], stderr=subprocess.PIPE)
    assert b'Weights only load failed' in run.stderr


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
@weights_only_is_default
def test_both_spellings_of_numpy(tmp_path, module):
    compatibility.allow_mmengine_checkpoints()
    path = str(tmp_path / 'buffer.pth')
    torch.save(dict(buffer=HistoryBuffer([1.5, 2.5], [1, 1]), scalar=np.float32(3.5)), path)
    written = next(name for name in ('numpy._core.multiarray', 'numpy.core.multiarray')
                   if name.encode() in zipfile.ZipFile(path).read('buffer/data.pkl'))
    rewrite_pickle(path, lambda data: data.replace(written.encode(), module.encode()))
    assert module.encode() in zipfile.ZipFile(path).read('buffer/data.pkl')
    loaded = torch.load(path)
    np.testing.assert_array_equal(loaded['buffer'].data[0], [1.5, 2.5])
    assert loaded['scalar'] == 3.5


def test_ssd_predicts():
    """Heads that have a loss keep theirs."""
    from mmdet.models.dense_heads import RetinaHead, SSDHead
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = SSDHead(num_classes=2, in_channels=(4, ), anchor_generator=dict(
            type='SSDAnchorGenerator', scale_major=False, input_size=300, strides=[8],
            ratios=[[2]], min_sizes=[30], max_sizes=[60]), test_cfg=ConfigDict(
                nms_pre=10, nms=dict(type='nms', iou_threshold=0.45), score_thr=0.02,
                max_per_img=5))
        other = RetinaHead(num_classes=2, in_channels=4)
    meta = dict(img_shape=(32, 32), scale_factor=(1., 1.))
    found, = head.predict_by_feat(*head((torch.rand(1, 4, 4, 4), )), batch_img_metas=[meta])
    assert 0 < len(found) <= 5 and other.loss_cls is not None


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
    compatibility.allow_mmengine_checkpoints()
    marker, path = tmp_path / 'marker', str(tmp_path / 'checkpoint.pth')
    torch.save(dict(state_dict={}), path)
    rewrite_pickle(path, lambda _: b'\x80\x02' + malicious_pickles(marker)[attack] + b'.')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(TinyModel(), path)
    assert not marker.exists()


@pytest.mark.parametrize('owner, name', [
    (os, 'system'), (HistoryBuffer, '__init__'), (HistoryBuffer, '__globals__'),
    (HistoryBuffer, '_statistics_methods'), (HistoryBuffer([1], [1]), 'mean'),
    (HistoryBuffer, 'register_statistics'), (HistoryBuffer, 'nothing'), (np, 'load')])
def test_getattr_answers_for_known_functions_alone(owner, name):
    with pytest.raises(pickle.UnpicklingError, match='is not allowed in a checkpoint'):
        compatibility._checkpoint_getattr(owner, name)


@weights_only_is_default
def test_object_arrays_stay_refused(tmp_path):
    compatibility.allow_mmengine_checkpoints()
    torch.save(np.array([None], dtype=object), str(tmp_path / 'array.pth'))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(str(tmp_path / 'array.pth'))


def native(optimizer, function):
    if not hasattr(optimizer, 'register_step_pre_hook'):
        pytest.skip('torch < 2.0')
    return compatibility.register_step_pre_hook(optimizer, function)


@pytest.mark.parametrize('register', [native, compatibility._StepPreHook])
@pytest.mark.parametrize('with_scheduler', [False, True])
def test_step_pre_hook(register, with_scheduler):
    from mmengine.optim import LinearLR
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if with_scheduler:
        scheduler = LinearLR(optimizer, start_factor=1.0)

    def one_step():
        weight.grad = torch.tensor([0.25])
        optimizer.step()
        if with_scheduler:
            scheduler.step()
        return weight.item()

    handle = register(optimizer, lambda opt: opt.param_groups[0]['params'][0].grad.add_(0.5))
    assert one_step() == 1.0 - 0.75
    handle.remove()
    assert one_step() == 0.25 - 0.25


def test_silenced_when_wrapped_again():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    calls = []
    first = compatibility._StepPreHook(optimizer, lambda _: calls.append(1))
    second = compatibility._StepPreHook(optimizer, lambda _: calls.append(2))
    first.remove()
    optimizer.step()
    second.remove()
    optimizer.step()
    assert calls == [2]
