# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import os
from importlib import metadata

import pytest
from scripts import ROOT, run_code

from mmgcp.compatibility import versions

GOOD = dict(torch='2.13.0+cpu', mmengine='0.10.7', mmcv='2.0.1', mmdet='3.3.0', mmyolo='0.6.0')


@pytest.fixture
def installed(monkeypatch):
    """A dict of the versions that importlib.metadata will report."""
    found = dict(GOOD)

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, 'version', version)
    return found


def test_good_versions_pass(installed):
    versions.check_versions()


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
        versions.check_versions()
    assert str(error.value) == f'mmgcp needs {wanted}, but {name} {version} is installed.'


@pytest.mark.parametrize('name, version', [('mmcv', '2.0.0'), ('torch', '1.13'),
                                           ('mmengine', '0.10.10'), ('mmdet', '3.10.0')])
def test_edges_pass(installed, name, version):
    installed[name] = version
    versions.check_versions()


@pytest.mark.parametrize('name', list(GOOD))
def test_missing_package_is_named(installed, monkeypatch, name):
    del installed[name]
    find_spec = versions.util.find_spec
    monkeypatch.setattr(versions.util, 'find_spec',
                        lambda module: None if module == name else find_spec(module))
    with pytest.raises(ImportError, match=f'mmgcp needs {name}>=.* {name} is not installed'):
        versions.check_versions()


def test_module_version_stands_in_for_metadata(installed):
    del installed['mmengine']
    versions.check_versions()


def test_mmcv_lite_is_named(installed):
    del installed['mmcv']
    installed['mmcv-lite'] = '2.0.1'
    with pytest.raises(ImportError, match='mmcv-lite 2.0.1 has none'):
        versions.check_versions()


def test_mmcv_without_ops_is_named(installed, monkeypatch):
    monkeypatch.setattr(versions.machinery.PathFinder, 'find_spec', lambda *args: None)
    with pytest.raises(ImportError, match=r'mmcv 2.0.1 has none \(mmcv._ext is missing\)'):
        versions.check_versions()


def test_user_sees_our_error_not_mmyolos(tmp_path):
    (tmp_path / 'mmcv-2.2.0.dist-info').mkdir()
    (tmp_path / 'mmcv-2.2.0.dist-info' / 'METADATA').write_text('Name: mmcv\nVersion: 2.2.0\n')
    run = run_code('import mmgcp', PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
    assert run.stderr.splitlines()[-1] == (
        'ImportError: mmgcp needs mmcv>=2.0.0,<2.1.0, but mmcv 2.2.0 is installed.')
