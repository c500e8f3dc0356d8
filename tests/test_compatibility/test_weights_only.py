# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Checkpoints from anywhere are read without running what is in them."""
import json
import pickle
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
from hostile_files import served, write_malicious
from mmengine.model import BaseModule
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from test_checkpoints import ATTACKS, malicious_pickles, rewrite_pickle
from tiny_runner import TinyModel, tiny_runner

from mmgcp.compatibility import mend_openmmlab
from mmgcp.compatibility.weights_only import TORCHSCRIPT, explain, safe_pickle_only, weights_only
from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import read_checkpoint

WHY = r'cannot be read as a checkpoint: it refers to \w+\.mkdir, which is not loaded'


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a server, its address, and what malicious checkpoints in it would make."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setenv('no_proxy', '*')
    folder, marker = tmp_path / 'site', tmp_path / 'marker'
    folder.mkdir()
    write_malicious(folder / 'evil.pth', marker)
    write_malicious(folder / 'old.pth', marker, zipped=False)
    torch.save(dict(state_dict=TinyModel().state_dict()), str(folder / 'good.pth'))
    with served(folder) as address:
        yield folder, address, marker
    assert not marker.exists()


def from_http(site, monkeypatch, name):
    return f'{site[1]}/{name}.pth'


def from_file(site, monkeypatch, name):
    return str(site[0] / f'{name}.pth')


def from_openmmlab(site, monkeypatch, name):
    home = site[0].parent / 'mmengine'
    home.mkdir(exist_ok=True)
    (home / 'open_mmlab.json').write_text(json.dumps({f'my/{name}': f'{site[1]}/{name}.pth'}))
    return f'openmmlab://my/{name}'


def from_openmmlab_file(site, monkeypatch, name):
    home = site[0].parent / 'mmengine'
    home.mkdir(exist_ok=True)
    (home / 'open_mmlab.json').write_text(json.dumps({'mine': str(site[0] / f'{name}.pth')}))
    return 'open-mmlab://mine'


def from_names(function, scheme):

    def make(site, monkeypatch, name):
        monkeypatch.setattr(f'mmengine.runner.checkpoint.{function}',
                            lambda: {'net': f'{site[1]}/{name}.pth'})
        return f'{scheme}://net'

    make.__name__ = f'from_{scheme}'
    return make


def from_pavi(site, monkeypatch, name):
    content = (site[0] / f'{name}.pth').read_bytes()

    class Model:
        name = 'model.pth'

        def download(self, path):
            with open(path, 'wb') as file:
                file.write(content)

    module = types.ModuleType('pavi')
    module.modelcloud = types.SimpleNamespace(get=lambda path: Model())
    monkeypatch.setitem(sys.modules, 'pavi', module)
    return 'pavi://team/model'


def from_s3(site, monkeypatch, name):
    content = (site[0] / f'{name}.pth').read_bytes()
    monkeypatch.setattr('mmengine.runner.checkpoint.get_file_backend',
                        lambda *args, **kwargs: types.SimpleNamespace(get=lambda path: content))
    return 'cluster:s3://bucket/model.pth'


SOURCES = [from_file, from_http, from_openmmlab, from_openmmlab_file, from_pavi, from_s3,
           from_names('get_torchvision_models', 'torchvision'),
           from_names('get_torchvision_models', 'modelzoo'),
           from_names('get_mmcls_models', 'mmcls')]


def test_sources_are_all_of_mmengine():
    """A scheme that a later version adds needs a source of its own here."""
    names = {loader.__name__ for loader in CheckpointLoader._schemes.values()}
    assert names == {f'load_from_{name}' for name in (
        'local', 'http', 'pavi', 'ceph', 'torchvision', 'openmmlab', 'mmcls')}


@pytest.mark.parametrize('source', SOURCES, ids=lambda source: source.__name__)
def test_code_is_not_run(site, monkeypatch, source):
    mend_openmmlab()
    for name in ('evil', 'old'):
        address = source(site, monkeypatch, name)
        with pytest.raises(UserError, match=WHY) as caught:
            read_checkpoint(address)
        assert 'weights_only' not in str(caught.value) and '\n' not in str(caught.value)
        with pytest.raises(UserError, match=WHY):
            load_checkpoint(TinyModel(), address)


@pytest.mark.parametrize('source', SOURCES, ids=lambda source: source.__name__)
def test_weights_are_read(site, monkeypatch, source):
    found = read_checkpoint(source(site, monkeypatch, 'good'))
    assert 'linear.weight' in found['state_dict'] or source.__name__ == 'from_mmcls'


def test_other_ways_of_mmengine_to_a_checkpoint(site):
    """Initial weights of a part, resuming, and what a runner starts from."""
    mend_openmmlab()
    address = f'{site[1]}/evil.pth'
    with pytest.raises(UserError, match=WHY):
        BaseModule(dict(type='Pretrained', checkpoint=address)).init_weights()
    with pytest.raises(UserError, match=WHY):
        BaseModule(dict(type='Pretrained', checkpoint=address, prefix='a.')).init_weights()
    for resume in (True, False):
        runner = tiny_runner(site[0] / f'run-{resume}', resume=resume, load_from=address)
        with pytest.raises(UserError, match=WHY):
            runner.train()


@pytest.mark.parametrize('address, reason', [
    ('openmmlab://nowhere', 'there is no such model'), ('mmcls://', 'there is no such model'),
    ('foo://x', 'can not be found'), ('http://127.0.0.1:9/x.pth', 'urlopen error'),
    ('http://127.0.0.1:port/x.pth', 'port'), ('https://', 'Is a directory|no host')])
def test_addresses_that_lead_nowhere(site, address, reason):
    with pytest.raises(UserError, match=reason) as caught:
        read_checkpoint(address)
    assert str(caught.value).startswith(f'{address} cannot be read as a checkpoint: ')
    assert '\n' not in str(caught.value)


def test_a_missing_file_of_a_server(site):
    with pytest.raises(UserError, match='cannot be read as a checkpoint: HTTP Error 404'):
        read_checkpoint(f'{site[1]}/nothing.pth')


@pytest.mark.parametrize('content, reason', [
    (b'hello world\n', 'it is not a file of torch.save, or is damaged'),
    (b'e', 'it is not a file of torch.save, or is damaged'),
    (b'', 'it is not a file of torch.save, or is damaged'),
    (b'\x80\x02.', 'it is not a file of torch.save, or is damaged'),
    (b'PK\x03\x04 no zip', 'PytorchStreamReader failed reading zip archive: .*')])
def test_files_of_other_kinds(tmp_path, content, reason):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'x.pth cannot be read as a checkpoint: {reason}$'):
        read_checkpoint(str(path))


def test_a_whole_model_and_a_program(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), str(tmp_path / 'model.pth'))
    with pytest.raises(UserError, match=r'refers to torch.nn.modules.container.Sequential, which '
                       r'is not loaded.* of a model its state_dict\(\) alone$'):
        read_checkpoint(str(tmp_path / 'model.pth'))
    torch.jit.script(nn.ReLU()).save(str(tmp_path / 'script.pth'))
    with pytest.raises(UserError, match=f': {TORCHSCRIPT}$'):
        read_checkpoint(str(tmp_path / 'script.pth'))


def test_torch_is_as_before_outside_of_the_loader(tmp_path):
    before = torch.load
    with pytest.raises(ZeroDivisionError), weights_only():
        assert torch.load is not before
        raise ZeroDivisionError
    assert torch.load is before


def test_torchs_advice_is_not_repeated():
    advice = ('Weights only load failed. In PyTorch 2.6, we changed the default value of '
              'weights_only. Re-running with `weights_only=False` will likely succeed.')
    assert explain(pickle.UnpicklingError(advice)) == (
        'it is not a file of torch.save, or is damaged')
    assert 'weights_only' not in explain(RuntimeError(advice))


class TestOldTorch:
    """The way in which torch before 2.6 is kept from running code, which suits newer ones, too."""

    def load(self, path):
        with safe_pickle_only():
            return torch.load(str(path))

    def test_everything_is_as_before_afterwards(self):
        before = torch.load, torch.serialization.pickle
        with pytest.raises(ZeroDivisionError), safe_pickle_only():
            raise ZeroDivisionError
        assert (torch.load, torch.serialization.pickle) == before == (torch.load, pickle)

    def test_programs(self, tmp_path):
        torch.jit.script(nn.ReLU()).save(str(tmp_path / 'script.pth'))
        with pytest.raises(pickle.UnpicklingError, match=TORCHSCRIPT):
            self.load(tmp_path / 'script.pth')

    def test_open_files(self, tmp_path):
        write_malicious(tmp_path / 'evil.pth', tmp_path / 'marker')
        torch.save(dict(a=torch.ones(2)), str(tmp_path / 'good.pth'))
        with open(str(tmp_path / 'evil.pth'), 'rb') as evil, open(
                str(tmp_path / 'good.pth'), 'rb') as good, safe_pickle_only():
            with pytest.raises(pickle.UnpicklingError, match='is not allowed'):
                torch.load(evil)
            assert torch.equal(torch.load(good)['a'], torch.ones(2))

    @pytest.mark.parametrize('attack', ATTACKS)
    def test_attacks(self, tmp_path, attack):
        marker, path = tmp_path / 'marker', str(tmp_path / 'checkpoint.pth')
        torch.save(dict(state_dict={}), path)
        rewrite_pickle(path, lambda _: b'\x80\x02' + malicious_pickles(marker)[attack] + b'.')
        with pytest.raises(pickle.UnpicklingError):
            self.load(path)
        assert not marker.exists()

    @pytest.mark.parametrize('zipped', [True, False])
    def test_malicious_checkpoints(self, tmp_path, zipped):
        path = write_malicious(tmp_path / 'evil.pth', tmp_path / 'marker', zipped)
        with pytest.raises(pickle.UnpicklingError, match=r'GLOBAL \w+\.mkdir is not allowed'):
            self.load(path)
        assert not (tmp_path / 'marker').exists()

    def test_classes_are_not_changed(self, tmp_path):
        """The state of an object may be set, that of a class not."""
        path = str(tmp_path / 'checkpoint.pth')
        torch.save({}, path)
        rewrite_pickle(path, lambda _: b'\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK'
                       b'\x01sb.')
        with pytest.raises(pickle.UnpicklingError, match='class or function'):
            self.load(path)

    @pytest.mark.parametrize('zipped', [True, False])
    def test_weights_are_read(self, tmp_path, zipped):
        state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half().state_dict()
        content = dict(state_dict=state, shared=state['0.weight'], parts=[nn.Parameter(torch.ones(
            2)), torch.arange(3), {1, 2}, 1.5, None, 'é', b'ab', torch.Size([2]), np.float32(2),
            Counter([8, 11]), torch.device('cpu'), torch.bfloat16, torch.uint8, torch.float32])
        torch.save(content, str(tmp_path / 'x.pth'), _use_new_zipfile_serialization=zipped)
        found = self.load(tmp_path / 'x.pth')
        assert all(torch.equal(value, found['state_dict'][key]) for key, value in state.items())
        assert found['shared'].data_ptr() == found['state_dict']['0.weight'].data_ptr()
        assert torch.equal(found['parts'][0], torch.ones(2)) and found['parts'][2:] == content[
            'parts'][2:]

    @pytest.mark.parametrize('settings', [
        dict(type='MultiStepLR', milestones=[8, 11]), dict(type='StepLR', step_size=2),
        dict(type='PolyLR', power=2), dict(type='ExponentialLR', gamma=0.9),
        dict(type='ConstantLR'),
        dict(type='CosineRestartLR', periods=[2, 3], restart_weights=[1, 1], eta_min=0.),
        dict(type='ReduceOnPlateauLR', monitor='loss'),
        dict(type='mmdet.QuadraticWarmupLR', end=3)],
        ids=lambda settings: settings['type'])
    def test_schedulers_are_read(self, tmp_path, settings):
        """Here, and by torch's own loader as it is mended."""
        mend_openmmlab()
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        scheduler = PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
        torch.save(dict(param_schedulers=[scheduler.state_dict()]), str(tmp_path / 'x.pth'))
        for found in (self.load(tmp_path / 'x.pth'),
                      CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'), 'cpu')):
            assert str(found['param_schedulers'][0]) == str(scheduler.state_dict())

    def test_checkpoints_of_mmengine_are_read(self, tmp_path):
        runner = tiny_runner(tmp_path)
        runner.message_hub.update_info('array', np.arange(3, dtype='f4'))
        runner.train()
        found = self.load(tmp_path / 'epoch_2.pth')
        loss = found['message_hub']['log_scalars']['train/loss']
        assert len(loss.data[0]) and np.array_equal(
            loss.data[0], runner.message_hub.get_scalar('train/loss').data[0])
        assert np.array_equal(found['message_hub']['runtime_info']['array'], [0, 1, 2])
        assert {'optimizer', 'param_schedulers', 'ema_state_dict'} <= set(found)
