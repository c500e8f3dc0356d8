# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from mmgcp.errors import UserError
from mmgcp.registry import TASK_UTILS
from mmgcp.sparsity import ConstantSchedule, TwoPhaseSchedule


@pytest.mark.parametrize('name, cls', [
    ('constant', ConstantSchedule), ('ConstantSchedule', ConstantSchedule),
    ('two_phase', TwoPhaseSchedule), ('TwoPhaseSchedule', TwoPhaseSchedule)])
def test_names(name, cls):
    assert type(TASK_UTILS.build(dict(type=name, _scope_='mmgcp'))) is cls
    with DefaultScope.overwrite_default_scope('mmyolo'):
        assert type(TASK_UTILS.build(dict(type=f'mmgcp.{name}'))) is cls


@pytest.mark.parametrize('progress', [0, 0.5, 0.999])
def test_constant(progress):
    assert ConstantSchedule().rates(torch.rand(5), 3e-4, progress) == 3e-4


def test_two_phase_by_hand():
    magnitudes = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])
    schedule = TwoPhaseSchedule(begin=0.4, percentile=0.5, kept_factor=0.01)
    assert schedule.rates(magnitudes, 1.0, 0.39) == 1.0
    # The median, 0.3, is at the threshold and thus spared.
    expected = torch.tensor([0.01, 1.0, 0.01, 1.0, 0.01])
    for progress in (0.4, 0.99):
        torch.testing.assert_close(schedule.rates(magnitudes, 1.0, progress), expected)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 20, 21, 100, 101, 30001])
@pytest.mark.parametrize('percentile', [0, 0.3, 0.65, 0.9, 1])
def test_two_phase_against_numpy(size, percentile):
    magnitudes = torch.rand(size, generator=torch.Generator().manual_seed(size))
    rates = TwoPhaseSchedule(percentile=percentile).rates(magnitudes, 1e-3, 0.5)
    # In float64, in which the interpolation cannot round up to the next value.
    values = magnitudes.double().numpy()
    spared = values >= np.percentile(values, 100 * percentile)
    np.testing.assert_allclose(rates.numpy(), np.where(spared, 1e-5, 1e-3), rtol=1e-6)


def test_two_phase_ties_are_spared_together():
    rates = TwoPhaseSchedule(percentile=0.5).rates(torch.ones(4), 1.0, 0.5)
    torch.testing.assert_close(rates, torch.full((4, ), 0.01))


def test_defaults_are_the_authors():
    schedule = TwoPhaseSchedule()
    assert (schedule.begin, schedule.percentile, schedule.kept_factor) == (0.4, 0.65, 0.01)


@pytest.mark.parametrize('wrong', [
    dict(begin=-0.1), dict(begin=40), dict(percentile=65), dict(percentile=float('nan')),
    dict(kept_factor=-1)])
def test_wrong_arguments(wrong):
    (name, value), = wrong.items()
    with pytest.raises(UserError, match=f'{name} must .* but is {value}'):
        TwoPhaseSchedule(**wrong)
