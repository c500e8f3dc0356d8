# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math

import pytest
import torch

from mmgcp.pruning.select import MERGES

NAN, INF = math.nan, math.inf
NAMES = sorted(MERGES)


def margins(merge, scores, thresholds):
    scores = torch.tensor(scores, dtype=torch.double)
    thresholds = torch.tensor(thresholds, dtype=torch.double)[:, None]
    copies = scores.clone(), thresholds.clone()
    found = MERGES[merge].margins(scores, thresholds)
    assert torch.equal(scores.nan_to_num(nan=-9), copies[0].nan_to_num(nan=-9))
    assert torch.equal(thresholds, copies[1])
    assert found.shape == scores.shape[1:] and found.dtype == torch.double
    return found.tolist()


def kept(*arguments):
    return [value > 0 for value in margins(*arguments)]


def test_names():
    assert NAMES == ['majority', 'mean', 'or', 'sum']


@pytest.mark.parametrize('merge', NAMES)
def test_one_layer_has_its_distance_from_the_threshold(merge):
    assert margins(merge, [[0.75, 0.5, 0.25, 0.]], [0.5]) == [0.25, 0., -0.25, -0.5]


THREE = [[0.75, 0.25, 0.75, 0.25], [0.5, 0.25, 0.25, 0.5], [0., 1., 0.25, 0.25]]


# distances from the thresholds 0.25, 0.5, 0.25:
#    0.5    0     0.5   0
#    0     -0.25 -0.25  0
#   -0.25   0.75  0     0
@pytest.mark.parametrize('merge, expected', [
    ('or', [0.5, 0.75, 0.5, 0.]),
    ('majority', [0., 0., 0., 0.]),
    ('mean', [0.25 / 3, 0.5 / 3, 0.25 / 3, 0.]),
    # sums 1.25, 1.5, 1.25, 1. with a mean threshold of 1/3
    ('sum', [1.25 - 1 / 3, 1.5 - 1 / 3, 1.25 - 1 / 3, 2 / 3]),
])
def test_three_layers_by_hand(merge, expected):
    assert margins(merge, THREE, [0.25, 0.5, 0.25]) == pytest.approx(expected)


@pytest.mark.parametrize('votes, stays', [
    ([1], True), ([0], False), ([1, 1], True), ([1, 0], False), ([1, 1, 0], True),
    ([1, 0, 0], False), ([1, 1, 0, 0], False), ([1, 1, 1, 0], True)])
def test_majority_is_more_than_half(votes, stays):
    for order in (votes, votes[::-1]):
        assert kept('majority', [[float(vote)] for vote in order], [0.5] * len(order)) == [stays]


def test_sum_keeps_what_all_layers_together_have():
    # each is below its threshold, both together are above
    scores, thresholds = [[0.4, 0.2], [0.3, 0.1]], [0.5, 0.5]
    assert kept('sum', scores, thresholds) == [True, False]
    assert kept('or', scores, thresholds) == kept('mean', scores, thresholds) == [False, False]


def test_mean_lets_a_strong_layer_outweigh_another():
    # 0.9 above and 0.4 below; 0.3 above and 0.4 below
    scores, thresholds = [[1., 0.4], [0.1, 0.1]], [0.1, 0.5]
    assert margins('mean', scores, thresholds) == pytest.approx([0.25, -0.05])
    assert kept('or', scores, thresholds) == [True, True]
    assert kept('majority', scores, thresholds) == [False, False]


WITH_GAPS = [[0.75, NAN, 0.25, NAN], [NAN, 0.25, 0.5, 0.75], [0.25, NAN, NAN, 0.]]


# distances from the thresholds 0.5, 0.25, 0.5:
#    0.25   -    -0.25   -
#     -     0     0.25   0.5
#   -0.25   -      -    -0.5
@pytest.mark.parametrize('merge, expected', [
    ('or', [0.25, 0., 0.25, 0.5]),
    # of two layers both have to keep it
    ('majority', [-0.25, 0., -0.25, -0.5]),
    ('mean', [0., 0., 0., 0.]),
    # sums 1, 0.25, 0.75, 0.75; mean thresholds 0.5, 0.25, 0.375, 0.375 of who has the channel
    ('sum', [0.5, 0., 0.375, 0.375]),
])
def test_layers_that_lack_a_channel_have_no_say(merge, expected):
    assert margins(merge, WITH_GAPS, [0.5, 0.25, 0.5]) == pytest.approx(expected)


@pytest.mark.parametrize('merge', NAMES)
def test_layer_without_threshold_keeps_all_it_has(merge):
    scores = [[0., 0., NAN], [0.25, 0.25, 0.25], [0., 0.25, 0.]]
    found = margins(merge, scores, [-INF, 0.5, 0.5])
    assert found[:2] == [INF, INF]
    assert -INF < found[2] < 0  # the others decide what it does not have


@pytest.mark.parametrize('merge', NAMES)
def test_no_layer_with_a_threshold(merge):
    assert margins(merge, [[0., 1.], [NAN, -1.]], [-INF, -INF]) == [INF, INF]


@pytest.mark.parametrize('merge', NAMES)
def test_channel_that_no_layer_scores_stays(merge):
    assert margins(merge, [[0.1, NAN], [0.1, NAN]], [0.5, 0.5])[1] == INF
    assert kept(merge, [[0.1, NAN], [0.1, NAN]], [0.5, 0.5])[0] is False


@pytest.mark.parametrize('merge', NAMES)
def test_higher_scores_have_higher_margins(merge):
    rows = torch.rand(3, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    raised = rows + 0.1
    thresholds = [0.2, 0.5, 0.8]
    assert all(after > before for before, after in zip(margins(merge, rows.tolist(), thresholds),
                                                       margins(merge, raised.tolist(), thresholds)))


@pytest.mark.parametrize('merge', NAMES)
def test_each_channel_goes_from_its_factor_on(merge):
    """In 1500 random cases: layers with fixed, growing and no thresholds, and absent channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, dtype=torch.double, generator=generator)

    seen = set()
    for _ in range(1500):
        layers = int(torch.randint(1, 6, (1, ), generator=generator))
        scores = draw(layers, 8).masked_fill(draw(layers, 8) < 0.2, NAN)
        grows = draw(layers, 1) < 0.7
        fixed = (draw(layers, 1) * ~grows).masked_fill(draw(layers, 1) < 0.1, -INF)
        slopes = draw(layers, 1) * grows
        factors = MERGES[merge].factors(scores, fixed, slopes)
        finite = factors[factors.isfinite()]
        for factor in torch.cat((2 * draw(3), finite - 1e-9, finite + 1e-9)):
            goes = MERGES[merge].margins(scores, fixed + factor * slopes) <= 0
            assert torch.equal(goes, factors <= factor)
        seen |= {INF, -INF} & set(factors.tolist())
    assert seen == {INF, -INF}
