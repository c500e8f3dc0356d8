# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The wheel: what it carries, and that it works without this folder."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ('configs', 'mmgcp', 'requirements', 'tools', 'MANIFEST.in', 'README.md',
           'model-index.yml', 'pyproject.toml', 'setup.py')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in SOURCES:  # a copy: building writes beside its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        ignored = dict(ignore=shutil.ignore_patterns('__pycache__', '.mim'))
        copy(ROOT / name, folder / name, **(ignored if copy is shutil.copytree else {}))
    run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
         '-w', 'out', '.'], folder)
    (wheel, ) = (folder / 'out').glob('mmgcp-*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / 'site')
    return folder / 'site'


def run(command, folder, site=None):
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    if site is not None:
        environment['PYTHONPATH'] = str(site)
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def names(folder):
    return {path.relative_to(folder) for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


@pytest.mark.slow
def test_configs_and_tools_are_in_it(installed):
    for name in ('configs', 'tools'):
        assert names(installed / 'mmgcp' / '.mim' / name) == names(ROOT / name)
    assert (installed / 'mmgcp' / 'py.typed').is_file()
    commands = next(installed.glob('*.dist-info')) / 'entry_points.txt'
    assert 'mmgcp-prune = mmgcp.console:main' in commands.read_text()


@pytest.mark.slow
def test_another_folder(installed, tmp_path):
    """A config that inherits one of the package, and a tool as a command."""
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'mmgcp::yolov4/yolov4_n_fast_1xb8-48e_demo-160.py'\n")
    code = ('import sys, mmgcp.console; from mmengine.config import Config; '
            'from mmgcp.utils.config import build_detector; '
            'build_detector(Config.fromfile("mine.py")); '
            'sys.argv = ["bin/mmgcp-prune", "--help"]; print(mmgcp.__file__); '
            'mmgcp.console.main()')
    printed = run([sys.executable, '-c', code], tmp_path, installed)
    assert str(installed) in printed and 'usage: prune.py' in printed
