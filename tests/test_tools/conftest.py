# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
from scripts import run_process, write_pruning_files


@pytest.fixture(scope='session')
def trained(tmp_path_factory, write_config):
    """A detector trained for one epoch: config, work_dir and output."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder / 'tiny.py')
    result = run_process('train.py', config, '--work-dir', folder / 'run', cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(config=config, work_dir=folder / 'run', output=result.stdout + result.stderr)


@pytest.fixture(scope='module')
def files(request, tmp_path_factory, write_config):
    """Config, with the SETTINGS of the module of tests, and checkpoint of a tiny detector."""
    folder = tmp_path_factory.mktemp('files')
    return write_pruning_files(write_config(folder / 'tiny.py'), request.module.SETTINGS)
