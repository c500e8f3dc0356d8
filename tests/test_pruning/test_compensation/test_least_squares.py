# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Least squares from sums, against NumPy's solver of overdetermined systems."""
import numpy as np
import pytest
import torch

from mmgcp.pruning.compensation.least_squares import LeastSquares


def make_samples(number=60, groups=2, inputs=5, outputs=3, seed=0):
    """Inputs with means and correlations, and targets that are not quite linear in them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(number, groups, inputs, dtype=torch.double, generator=generator)
    z = z @ torch.randn(inputs, inputs, dtype=torch.double, generator=generator) + 2
    y = z @ torch.randn(inputs, outputs, dtype=torch.double, generator=generator) - 1
    return z, y + torch.randn(y.shape, dtype=torch.double, generator=generator)


def make_prior(groups=2, inputs=5, outputs=3):
    return torch.randn(groups, outputs, inputs, dtype=torch.double,
                       generator=torch.Generator().manual_seed(9))


def expected_matrix(z, y, indicators, prior, ridge):
    """The matrix (O, I) and the offsets (K, O) of a group.

    Each sample has a row, and the prior one for each input; ``indicators`` (S, K) tell the offsets.
    """
    z, y, prior = (value.numpy() for value in (z, y, prior))
    means = indicators @ np.linalg.pinv(indicators) @ z
    strength = np.sqrt(ridge * np.square(z - means).mean())
    rows = np.block([[z, indicators], [strength * np.eye(z.shape[1]),
                                       np.zeros((z.shape[1], indicators.shape[1]))]])
    solution = np.linalg.lstsq(rows, np.concatenate((y, strength * prior.T)), rcond=None)[0]
    return solution[:z.shape[1]].T, solution[z.shape[1]:]


@pytest.mark.parametrize('ridge', [0, 1, 200])
@pytest.mark.parametrize('portions', [[60], [1, 19, 40]])
def test_one_offset(ridge, portions):
    (z, y), prior = make_samples(), make_prior()
    solver = LeastSquares(prior, ridge)
    for inputs, targets in zip(z.split(portions), y.split(portions)):
        solver.add(inputs, targets, 'bias')
    matrix, offsets = solver.solve()
    for group in range(2):
        expected, offset = expected_matrix(z[:, group], y[:, group], np.ones((60, 1)),
                                           prior[group], ridge)
        assert np.allclose(matrix[group], expected, atol=1e-9)
        assert np.allclose(offsets['bias'][group], offset[0], atol=1e-9)


@pytest.mark.parametrize('ridge', [0, 30])
def test_several_offsets_and_none(ridge):
    """Samples with the key None are estimated without an offset."""
    (z, y), prior = make_samples(), make_prior()
    solver = LeastSquares(prior, ridge)
    keys = ['first', 'second', None, 'first']
    for inputs, targets, key in zip(z.split(15), y.split(15), keys):
        solver.add(inputs, targets + (5 if key == 'second' else 0), key)
    matrix, offsets = solver.solve()
    assert set(offsets) == {'first', 'second'}
    indicators = np.repeat([[1., 0.], [0., 1.], [0., 0.], [1., 0.]], 15, 0)
    shifted = y + 5 * torch.from_numpy(indicators[:, 1])[:, None, None]
    for group in range(2):
        expected, offset = expected_matrix(z[:, group], shifted[:, group], indicators,
                                           prior[group], ridge)
        assert np.allclose(matrix[group], expected, atol=1e-9)
        assert np.allclose(torch.stack([offsets['first'][group], offsets['second'][group]]), offset,
                           atol=1e-9)


def test_only_sums_are_kept():
    def size(rounds):
        solver = LeastSquares(make_prior(), 0.1)
        for seed in range(rounds):
            solver.add(*make_samples(seed=seed), 'bias')
        return sum(tensor.numel() for tensor in (
            solver.gram, solver.cross, *(value for sums in solver.sums.values()
                                         for value in sums)))

    assert size(2) == size(20)


def test_single_precision_with_large_means():
    """Deviations of a thousandth of the mean are still resolved."""
    z, y = make_samples()
    z = z + 1000
    results = []
    for dtype in (torch.double, torch.float):
        solver = LeastSquares(make_prior(), 0.1)
        solver.add(z.to(dtype), y.to(dtype), 'bias')
        results.append(solver.solve()[0])
    assert torch.allclose(*results, atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    z, y = (value.to(dtype) for value in make_samples())
    found, expected = LeastSquares(make_prior(), 0.1), LeastSquares(make_prior(), 0.1)
    found.add(z, y, None)
    expected.add(z.double(), y.double(), None)
    assert torch.allclose(found.solve()[0], expected.solve()[0], atol=1e-4)


def test_what_samples_do_not_tell_is_the_prior():
    prior = make_prior()
    empty = LeastSquares(prior, 0.01).solve()
    assert torch.equal(empty[0], prior) and empty[1] == {}
    z, y = make_samples()
    z[..., 1] = 3.  # constant: an offset can do the same
    z[..., 4] = 0.
    solver = LeastSquares(prior, 1e-7)
    solver.add(z.float(), y.float(), 'bias')
    matrix, _ = solver.solve()
    assert torch.allclose(matrix[..., [1, 4]], prior[..., [1, 4]], atol=1e-3)
    assert not torch.allclose(matrix[..., 0], prior[..., 0], atol=0.1)


def test_single_sample():
    (z, y), prior = make_samples(1), make_prior()
    solver = LeastSquares(prior, 0.01)
    solver.add(z.float(), y.float(), 'bias')
    matrix, offsets = solver.solve()
    assert torch.allclose(matrix, prior)
    assert torch.allclose(offsets['bias'], y[0] - (prior @ z[0][..., None])[..., 0], atol=1e-4)


def test_targets_without_inputs():
    solver = LeastSquares(torch.zeros(2, 3, 0), 0.01)
    _, y = make_samples()
    solver.add(y[..., :0], y, 'bias')
    matrix, offsets = solver.solve()
    assert matrix.shape == (2, 3, 0)
    assert torch.allclose(offsets['bias'], y.mean(0))
