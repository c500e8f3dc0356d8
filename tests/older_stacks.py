# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What tests that older versions of PyTorch and OpenMMLab cannot run are skipped by."""
import pytest
import torch
from mmengine.utils import digit_version

from mmgcp.errors import UserError
from mmgcp.utils.config import load_config

# Mish, and GroupNorm with weights in single precision
needs_cpu_autocast = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.0'),
    reason='this PyTorch lacks operations in bfloat16 on the CPU')


def config_or_skip(path, options=None):
    """Load a config of a package; skip the test if the installed version lacks it."""
    try:
        return load_config(path, options)
    except UserError as error:
        if 'does not exist' not in str(error):
            raise
        return pytest.skip(f'there is no {path} in this version')
