# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Each tool is given a checkpoint that runs code when it is unpickled, as a file and as a URL."""
import pytest
from hostile_files import served, write_malicious
from scripts import complaint_of
from yolov4_samples import config_text

from mmgcp.distillation.features import FrozenTeacher
from mmgcp.errors import UserError


@pytest.fixture(scope='module')
def files(tmp_path_factory, write_config):
    """The config of a detector with data, the marker, and a malicious checkpoint: file and URL."""
    folder = tmp_path_factory.mktemp('hostile')
    config, marker = write_config(folder / 'tiny.py'), folder / 'marker'
    (folder / 'site').mkdir()
    path = write_malicious(folder / 'site' / 'evil.pth', marker)
    with served(folder / 'site') as address:
        yield config, marker, dict(file=str(path), url=f'{address}/evil.pth')


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '*')


COMMANDS = {
    'prune.py': ('prune.py', '{config}', '{checkpoint}', '--work-dir', 'out', '--ratio', 0.5),
    'load_from of prune.py': ('prune.py', '{config}', '--work-dir', 'out', '--ratio', 0.5,
                              '--cfg-options', 'load_from={checkpoint}'),
    'export.py': ('export.py', '{config}', '{checkpoint}', 'out.onnx'),
    'test.py': ('test.py', '{config}', '{checkpoint}', '--work-dir', 'out'),
    'train.py': ('train.py', '{config}', '--work-dir', 'out', '--cfg-options',
                 'load_from={checkpoint}'),
    'compress.py': ('compress.py', '{config}', '{checkpoint}', '--work-dir', 'out'),
    'compare.py': ('analysis_tools/compare.py', '{config}', '{checkpoint}', '--work-dir', 'out'),
    'plot_sparsity.py': ('analysis_tools/plot_sparsity.py', '{config}', '{checkpoint}', '--out',
                         'x.png'),
    'mmgcp_to_darknet.py': ('model_converters/mmgcp_to_darknet.py', '{config}', '{checkpoint}',
                            'out'),
}


@pytest.mark.parametrize('source', ['file', 'url'])
@pytest.mark.parametrize('name', COMMANDS)
def test_tools(files, tmp_path, name, source):
    config, marker, checkpoints = files
    arguments = [str(item).format(config=config, checkpoint=checkpoints[source])
                 for item in COMMANDS[name]]
    message = complaint_of(*arguments, cwd=tmp_path)
    assert 'cannot be read as a checkpoint: it refers to posix.mkdir, which is not' in message
    assert not marker.exists()
    assert not (tmp_path / 'out' / 'pruned.pth').exists()
    assert not list(tmp_path.glob('out.*')) and not (tmp_path / 'x.png').exists()


@pytest.mark.parametrize('source', ['file', 'url'])
def test_teacher(files, tmp_path, source):
    _, marker, checkpoints = files
    (tmp_path / 'teacher.py').write_text(config_text())
    with pytest.raises(UserError, match='it refers to posix.mkdir, which is not loaded'):
        FrozenTeacher(str(tmp_path / 'teacher.py'), checkpoints[source])
    assert not marker.exists()
