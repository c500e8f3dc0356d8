# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
from darknet_samples import build, tiny_config, write_darknet


@pytest.fixture(scope='session')
def tiny_model():
    return build(tiny_config())


@pytest.fixture(scope='session')
def tiny_files(tiny_model, tmp_path_factory):
    return write_darknet(tiny_model, tmp_path_factory.mktemp('darknet'))
