# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math

import pytest
import torch

from mmgcp.errors import UserError
from mmgcp.registry import TASK_UTILS
from mmgcp.sparsity import CosineSchedule, FeedbackSchedule, LinearSchedule, StepSchedule

MAGNITUDES = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize('name', ['linear', 'cosine', 'step', 'feedback'])
def test_names(name):
    options = dict(target=0.5) if name == 'feedback' else {}
    for kind in (name, f'{name.capitalize()}Schedule'):
        schedule = TASK_UTILS.build(dict(type=kind, _scope_='mmgcp', **options))
        assert type(schedule).__name__ == f'{name.capitalize()}Schedule'


@pytest.mark.parametrize('progress, wanted', [
    (0, 0.), (0.2, 0.), (0.3, 0.25), (0.4, 0.5), (0.5, 0.75), (0.6, 1.), (0.99, 1.)])
def test_linear(progress, wanted):
    schedule = LinearSchedule(begin=0.2, end=0.6)
    assert schedule.rates(MAGNITUDES, 1e-3, progress) == pytest.approx(1e-3 * wanted)
    falling = LinearSchedule(start=3, stop=1, begin=0.2, end=0.6)
    assert falling.rates(MAGNITUDES, 1e-3, progress) == pytest.approx(1e-3 * (3 - 2 * wanted))


@pytest.mark.parametrize('progress, wanted', [
    (0, 0.), (0.25, 0.5 - math.sqrt(0.125)), (0.5, 0.5), (0.75, 0.5 + math.sqrt(0.125))])
def test_cosine(progress, wanted):
    assert CosineSchedule().rates(MAGNITUDES, 2., progress) == pytest.approx(2 * wanted)


@pytest.mark.parametrize('progress, wanted', [
    (0, 1), (0.49, 1), (0.5, 0.2), (0.8, 0.2), (0.9, 0.04), (1, 0.04)])
def test_step(progress, wanted):
    schedule = StepSchedule(milestones=[0.5, 0.9], factor=0.2)
    assert schedule.rates(MAGNITUDES, 1e-3, progress) == pytest.approx(1e-3 * wanted)


def test_feedback_law_by_hand():
    schedule = FeedbackSchedule(0.6, ramp=0.5, strength=10)

    def factor():
        return schedule.rates(MAGNITUDES, 1., 0.9).max().item()

    schedule.update(0.9, 0.)  # nothing is known about how long that has been so
    assert factor() == 1
    schedule.update(0.1, 0.1)  # 0.12 are wanted by now
    assert factor() == pytest.approx(math.exp(10 * 0.02 * 0.1))
    schedule.update(0.7, 0.8)
    assert factor() == pytest.approx(math.exp(10 * (0.02 * 0.1 - 0.1 * 0.7)))
    before = schedule.state_dict()
    for progress in (0.8, 0.9):
        schedule.rates(MAGNITUDES, 1., progress)
    assert schedule.state_dict() == before


def test_feedback_is_bounded_and_does_not_wind_up():
    schedule = FeedbackSchedule(0.5, ramp=0, strength=100, min_factor=0.5, max_factor=4)
    for progress in (0, 0.4, 0.6):
        schedule.update(0., progress)
    assert schedule.rates(MAGNITUDES, 1., 0.6).max() == pytest.approx(4)
    schedule.update(1., 0.61)  # leaves the bound at once
    assert schedule.rates(MAGNITUDES, 1., 0.6).max() == pytest.approx(4 * math.exp(-0.5))
    schedule.update(1., 0.9)
    assert schedule.rates(MAGNITUDES, 1., 0.9).max() == pytest.approx(0.5)


def test_feedback_spares_the_channels_to_be_kept():
    schedule = FeedbackSchedule(0.5, ramp=0, strength=10, kept_factor=0.1)
    expected = torch.tensor([0.1, 1., 0.1, 1., 0.1])
    torch.testing.assert_close(schedule.rates(MAGNITUDES, 1., 0.), expected)
    schedule.update(0., 0.)
    schedule.update(0., 0.2)  # pressed more, the kept ones not more
    expected[[1, 3]] = math.e
    torch.testing.assert_close(schedule.rates(MAGNITUDES, 1., 0.2), expected)


def test_feedback_reaches_its_target():
    """Scale factors that resist with different strengths, under proximal steps."""
    gammas = torch.linspace(0.2, 2, 100)
    schedule = FeedbackSchedule(0.6)
    for iteration in range(400):
        gammas += 0.01 * (torch.linspace(0.2, 2, 100) - gammas)
        rates = schedule.rates(gammas.abs(), 5e-2, iteration / 400)
        gammas = gammas.sign() * (gammas.abs() - 0.1 * rates).clamp(min=0)
        schedule.update((gammas.abs() < 1e-2).double().mean().item(), iteration / 400)
    assert (gammas.abs() < 1e-2).float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert gammas.max() > 1.5


def test_feedback_state():
    first, second = (FeedbackSchedule(0.5) for _ in range(2))
    for progress in (0., 0.1):
        first.update(0.2, progress)
    second.load_state_dict(first.state_dict())
    for schedule in (first, second):
        schedule.update(0.3, 0.2)
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize('cls, wrong, value', [
    (LinearSchedule, dict(start=-1), '-1'), (LinearSchedule, dict(end=2), '2'),
    (CosineSchedule, dict(begin=0.5, end=0.5), '0.5 and 0.5'),
    (LinearSchedule, dict(stop=math.inf), 'inf'),
    (StepSchedule, dict(milestones=[0.5, 1.5]), r'\[0.5, 1.5\]'),
    (StepSchedule, dict(milestones=[0.5, 0.2]), r'\[0.5, 0.2\]'),
    (StepSchedule, dict(factor=-0.1), '-0.1'),
    (FeedbackSchedule, dict(target=60), '60'), (FeedbackSchedule, dict(target=1, ramp=-1), '-1'),
    (FeedbackSchedule, dict(target=1, strength=float('nan')), 'nan'),
    (FeedbackSchedule, dict(target=1, min_factor=0), '0'),
    (FeedbackSchedule, dict(target=1, max_factor=0.5), '0.5'),
    (FeedbackSchedule, dict(target=1, kept_factor=-2), '-2')])
def test_wrong_arguments(cls, wrong, value):
    with pytest.raises(UserError, match=f'but (is|they are) {value}'):
        cls(**wrong)
