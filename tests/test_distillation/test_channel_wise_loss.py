# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from mmgcp.distillation import ChannelWiseLoss, FeatureMimicLoss, PearsonLoss
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


def features(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_one_channel_of_two_positions():
    # softmax over the positions: teacher (3/4, 1/4), student (1/2, 1/2)
    teacher = torch.tensor([[[[3., 1.]]]]).log()
    loss = ChannelWiseLoss()(torch.zeros(1, 1, 1, 2), teacher)
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('tau', [1., 4.])
def test_channel_wise_loss_is_that_of_distributions(tau):
    student, teacher = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    loss = ChannelWiseLoss(tau=tau, loss_weight=5.)(student, teacher)
    divergences = kl_divergence(*(Categorical(logits=feature.double().flatten(2) / tau)
                                  for feature in (teacher, student)))
    assert divergences.shape == (2, 3)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(5 * tau**2 * divergences.mean().item(), rel=1e-5)


def test_mimic_loss_by_hand():
    student, teacher = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    difference = student.double().numpy() - teacher.double().numpy()
    assert FeatureMimicLoss(7.)(student, teacher).item() == pytest.approx(
        7 * (difference**2).mean(), rel=1e-5)


@pytest.mark.parametrize('kind', [ChannelWiseLoss, FeatureMimicLoss, PearsonLoss])
class TestAll:

    def test_zero_when_equal(self, kind):
        loss = kind(1e3)
        assert loss(features(2, 3, 4, 5), features(2, 3, 4, 5)).item() == pytest.approx(
            0, abs=1e-6)

    def test_adapter(self, kind):
        loss = kind(1.)
        loss.adapt(3, 6)
        student, teacher = features(2, 3, 4, 5), features(2, 6, 4, 5, seed=1)
        adapted = torch.einsum('oc,nchw->nohw', loss.adapter.weight[:, :, 0, 0], student)
        torch.testing.assert_close(loss(student, teacher), kind(1.)(adapted, teacher))
        assert [name for name, _ in loss.named_parameters()] == ['adapter.weight']

    def test_no_adapter_for_equal_channels(self, kind):
        loss = kind(1.)
        loss.adapt(3, 3)
        assert loss.adapter is None and not list(loss.parameters())

    def test_missing_adapter(self, kind):
        with pytest.raises(UserError, match="student's 3 channels .* teacher's 6"):
            kind(1.)(features(2, 3, 4, 5), features(2, 6, 4, 5))

    def test_teacher_of_another_size_is_resized(self, kind):
        student, teacher = features(2, 3, 4, 4), features(2, 3, 8, 8, seed=1)
        with pytest.warns(UserWarning, match=r"size \(8, 8\) is resized"):
            value = kind(1.)(student, teacher)
        # Half the size: bilinear interpolation is the mean of 2 x 2.
        halved = teacher.view(2, 3, 4, 2, 4, 2).mean((3, 5))
        torch.testing.assert_close(value, kind(1.)(student, halved))

    def test_halves_are_compared_in_single_precision(self, kind):
        student, teacher = features(1, 2, 4, 4).half(), features(1, 2, 4, 4, seed=1).half()
        loss = kind(1.)(student, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, kind(1.)(student.float(), teacher.float()))

    def test_registered(self, kind):
        assert isinstance(MODELS.build(dict(type=f'mmgcp.{kind.__name__}')), kind)


@pytest.mark.parametrize('tau', [0, -1.])
def test_wrong_temperature(tau):
    with pytest.raises(UserError, match=f'tau must be .* but is {tau}'):
        ChannelWiseLoss(tau=tau)
