# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A small detector and images for it."""
import pytest
from yolov4_samples import build, yolov4

from mmgcp.deployment.check import sample_images


@pytest.fixture(scope='module')
def detector(modules):
    return build(yolov4()).eval()


@pytest.fixture(scope='module')
def images(detector):
    return sample_images(detector, (2, 3, 64, 64))
