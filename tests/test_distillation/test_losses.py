# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings

import numpy as np
import pytest
import torch

import mmgcp  # noqa: F401
from mmgcp.distillation import SpatialAttentionLoss, spatial_attention
from mmgcp.registry import MODELS


def attention_by_hand(feature: np.ndarray) -> np.ndarray:
    rows = []
    for image in feature.astype(np.float64):
        energy = sum(channel**2 for channel in image) / len(image)
        rows.append(energy.ravel() / np.sqrt((energy**2).sum()))
    return np.stack(rows)


def features(*shape, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_attention_of_one_channel():
    feature = torch.tensor([[[[1., 2.], [0., -1.]]]])
    # squares 1, 4, 0, 1; norm sqrt(18)
    expected = torch.tensor([[1., 4., 0., 1.]]) / 18**0.5
    torch.testing.assert_close(spatial_attention(feature), expected)


def test_attention_by_hand():
    feature = features(2, 3, 4, 5)
    attention = spatial_attention(feature)
    assert attention.shape == (2, 20)
    np.testing.assert_allclose(attention, attention_by_hand(feature.numpy()), rtol=1e-5)


def test_attention_of_halves_is_computed_in_single_precision():
    feature = torch.full((1, 2, 2, 2), 1000., dtype=torch.half)  # its squares overflow
    attention = spatial_attention(feature)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, torch.full((1, 4), 0.5))


def test_attention_under_autocast_is_computed_in_single_precision():
    feature = features(2, 3, 4, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        attention = spatial_attention(feature.bfloat16())
        loss = SpatialAttentionLoss()(feature.bfloat16(), feature)
    assert attention.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(attention, spatial_attention(feature.bfloat16().float()))


def test_dead_feature_has_finite_gradients():
    feature = torch.zeros(1, 2, 3, 3, requires_grad=True)
    SpatialAttentionLoss()(feature, features(1, 2, 3, 3)).backward()
    assert torch.isfinite(feature.grad).all()


def test_loss_by_hand_with_different_channels():
    student, teacher = features(2, 3, 4, 5), features(2, 7, 4, 5, seed=1)
    difference = attention_by_hand(student.numpy()) - attention_by_hand(teacher.numpy())
    loss = SpatialAttentionLoss(loss_weight=50.)(student, teacher)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(50 * (difference**2).mean(), rel=1e-5)


def test_loss_is_zero_for_equal_attention():
    feature = features(2, 3, 4, 5)
    loss = SpatialAttentionLoss(1e6)
    assert loss(feature, feature) == 0
    assert loss(feature, torch.cat((-3 * feature, 3 * feature), 1)) == pytest.approx(0, abs=1e-6)


def test_teacher_of_another_size_is_resized_with_one_warning():
    student, teacher = features(2, 3, 4, 4), features(2, 5, 8, 8, seed=1)
    loss = SpatialAttentionLoss()
    with pytest.warns(UserWarning, match=r"size \(8, 8\) is resized to the student's \(4, 4\)"):
        value = loss(student, teacher)
    # Half the size: bilinear interpolation is the mean of 2 x 2.
    energy = (teacher.numpy()**2).mean(1).reshape(2, 4, 2, 4, 2).mean((2, 4))
    difference = attention_by_hand(student.numpy()) - attention_by_hand(
        np.sqrt(energy)[:, None])
    assert value.item() == pytest.approx((difference**2).mean(), rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss(student, teacher)


def test_loss_is_registered():
    loss = MODELS.build(dict(type='mmgcp.SpatialAttentionLoss', loss_weight=3.))
    assert isinstance(loss, SpatialAttentionLoss) and loss.loss_weight == 3.
