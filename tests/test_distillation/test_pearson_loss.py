# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What it has in common with other losses is tested with them in test_channel_wise_loss.py."""
import numpy as np
import pytest
import torch

from mmgcp.distillation import PearsonLoss
from mmgcp.distillation.feature_losses import standardize


def features(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def correlations(student, teacher):
    """Pearson's coefficient of each channel, over all images and positions."""
    pairs = (feature.double().numpy().swapaxes(0, 1) for feature in (student, teacher))
    return np.array([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(*pairs)])


def test_by_hand():
    # (1, 2, 3) and (3, 1, 2) are both standardised with mean 2 and variance 2/3, so that the
    # mean squared difference of (-1, 0, 1) and (1, -1, 0), 6/3, becomes 3, of which half is 3/2.
    student, teacher = torch.tensor([[[[1., 2., 3.]]]]), torch.tensor([[[[3., 1., 2.]]]])
    assert PearsonLoss()(student, teacher).item() == pytest.approx(1.5, rel=1e-5)


def test_is_one_minus_the_correlation():
    student, teacher = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    expected = 6 * (1 - correlations(student, teacher)).mean()
    assert PearsonLoss(6.)(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_images_are_standardised_together():
    """The mean of an image is part of the pattern."""
    student = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert PearsonLoss()(student, student * 3 + 1).item() == pytest.approx(0, abs=1e-5)
    assert PearsonLoss()(student, -student).item() == pytest.approx(2, rel=1e-4)


def test_strength_and_offset_of_a_channel_do_not_count():
    student, teacher = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    scale, offset = torch.tensor([0.1, 5., 100.]).view(1, 3, 1, 1), features(1, 3, 1, 1, seed=2)
    torch.testing.assert_close(PearsonLoss()(student, teacher),
                               PearsonLoss()(student * scale + offset, teacher * 7), rtol=1e-3,
                               atol=1e-4)


def test_gradient_is_that_of_the_correlation():
    student, teacher = features(2, 3, 4, 5).double().requires_grad_(), features(2, 3, 4, 5, seed=1)
    PearsonLoss()(student, teacher).backward()
    moved, step = student.detach().clone(), 1e-4
    moved[1, 2, 3, 4] += step
    difference = -(correlations(moved, teacher) - correlations(student.detach(), teacher)).mean()
    assert student.grad[1, 2, 3, 4].item() == pytest.approx(difference / step, rel=1e-2)


@pytest.mark.parametrize('value', [0., 3.])
def test_constant_channel(value):
    student, teacher = torch.full((2, 1, 3, 3), value), features(2, 1, 3, 3)
    student.requires_grad_()
    loss = PearsonLoss()(student, teacher)
    assert loss.item() == pytest.approx(0.5, rel=1e-4)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert PearsonLoss()(teacher, student.detach()).item() == pytest.approx(0.5, rel=1e-4)
    assert PearsonLoss()(student, student) == 0


def test_single_position():
    assert PearsonLoss()(features(1, 4, 1, 1), features(1, 4, 1, 1, seed=1)) == 0


def test_standardised_feature():
    feature = standardize(features(2, 3, 4, 5) * 7 + 2).numpy()
    np.testing.assert_allclose(feature.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(feature.std((0, 2, 3)), 1, rtol=1e-5)


def test_single_precision():
    student, teacher = features(2, 3, 4, 4).half() * 1000, features(2, 3, 4, 4, seed=1).half()
    expected = PearsonLoss()(student.float(), teacher.float())
    torch.testing.assert_close(PearsonLoss()(student, teacher), expected)  # squares overflow
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = PearsonLoss()(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
