# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch
from mmcv.ops import RoIAlign, roi_align

from mmgcp.pruning.layerwise.auxiliary.targets import Positives
from mmgcp.pruning.layerwise.lcp import contextual_roi_align, enclosing_boxes

PRIORS = torch.tensor([[2., 4., 10., 12.], [5., 5., 25., 15.], [-4., 0., 8., 8.]])
BOXES = torch.tensor([[6., 2., 14., 9.], [8., 7., 20., 12.], [1., 3., 30., 5.]])
ENCLOSING = torch.tensor([[2., 2., 14., 12.], [5., 5., 25., 15.], [-4., 0., 30., 8.]])
IMAGES = torch.tensor([1, 0, 1])


def positives(image_size=(32, 48)):
    return Positives(IMAGES, PRIORS, BOXES, torch.zeros(3, dtype=torch.long), image_size)


def test_enclosing_boxes():
    assert torch.equal(enclosing_boxes(PRIORS, BOXES), ENCLOSING)
    assert torch.equal(enclosing_boxes(BOXES, PRIORS), ENCLOSING)


def test_it_is_roi_align_of_the_enclosing_box():
    feature = torch.randn(2, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    rois = torch.cat((IMAGES[:, None].float(), ENCLOSING), 1)
    for size in (7, 3):
        expected = RoIAlign((size, size), 12 / 48, sampling_ratio=2)(feature, rois)
        found = contextual_roi_align(feature, positives(), size)
        assert found.shape == (3, 5, size, size)
        assert torch.allclose(found, expected, atol=1e-5)


def test_maps_that_are_rounded_up():
    """A direction of 30 pixels in 4 cells, the other one of 48 in 12."""
    feature = torch.randn(2, 5, 4, 12, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([12 / 48, 4 / 30, 12 / 48, 4 / 30])
    rois = torch.cat((IMAGES[:, None].float(), ENCLOSING * scale), 1)
    expected = roi_align(feature, rois, (7, 7), 1., 2, 'avg', True)
    assert torch.allclose(contextual_roi_align(feature, positives((30, 48))), expected, atol=1e-5)


def test_where_it_looks():
    """On a map of the x coordinates the cells have those of the enclosing box."""
    xs = torch.arange(48.) + 0.5  # of the pixels' centres
    feature = xs.expand(2, 1, 32, 48)
    found = contextual_roi_align(feature, positives(), 4)[1, 0]
    assert torch.allclose(found, 5 + 20 * (torch.arange(4.) + 0.5).expand(4, 4) / 4, atol=1e-4)


def test_gradients_and_precision():
    feature = torch.rand(2, 3, 8, 12, dtype=torch.double, requires_grad=True)
    contextual_roi_align(feature, positives()).sum().backward()
    assert feature.grad.dtype == torch.double and feature.grad.abs().sum() > 0
