# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import cv2
import numpy as np
import pytest
from picture_colours import colours, palette

from mmgcp.analysis.plots import (
    plot_channels,
    plot_comparison,
    plot_pareto,
    plot_score_histograms,
)


def test_channels_areas(tmp_path):
    path = tmp_path / 'channels.png'
    plot_channels(['a', 'b', 'c', 'd'], [100] * 4, [100, 50, 25, 0], ['x', 'x', 'y', ''], path)
    found = colours(path)
    grey = found[(0xd8, 0xdd, 0xe3)]
    # 150 channels in the first group's colour, 25 in the second's, 225 removed
    assert found[palette(0)] / grey == pytest.approx(150 / 225, rel=0.1)
    assert found[palette(1)] / grey == pytest.approx(25 / 225, rel=0.2)


def test_many_layers_make_a_wide_picture(tmp_path):
    for number in (10, 110):
        plot_channels([f'layer{i}' for i in range(number)], [8] * number, [4] * number,
                      ['x'] * number, tmp_path / f'{number}.png')
    few, many = (cv2.imread(str(tmp_path / f'{number}.png')) for number in (10, 110))
    assert few.shape[1] == 960 and many.shape[1] > 2000


def test_score_histograms(tmp_path):
    rng = np.random.default_rng(0)
    scores = dict(one=rng.random(500).tolist(), two=rng.random(200).tolist())
    plot_score_histograms(scores, dict(one=0.4), 'score', tmp_path / 'with.png')
    plot_score_histograms(scores, dict(one=None, two=None), 'score', tmp_path / 'without.png')
    with_line, without = colours(tmp_path / 'with.png'), colours(tmp_path / 'without.png')
    assert with_line[palette(0)] > 5000 and with_line[palette(1)] > 5000
    assert with_line[(0, 0, 0)] > without[(0, 0, 0)] + 50
    image = cv2.imread(str(tmp_path / 'with.png'))
    assert image.shape[:2] == (round(120 * 4.2), 960)


@pytest.mark.parametrize('scores', [dict(one=[]), dict(one=[0., 0.]), dict(one=[1.], two=[])])
def test_few_scores(scores, tmp_path):
    plot_score_histograms(scores, dict.fromkeys(scores, 0.5), 'score', tmp_path / 'few.png')
    assert cv2.imread(str(tmp_path / 'few.png')).std() > 1


@pytest.mark.parametrize('values', [[float('nan')], [], [float('inf'), 0.5, -float('inf')],
                                    [float('nan'), 0.1, 0.9]])
def test_scores_that_are_not_finite(tmp_path, values):
    """They are counted, not drawn."""
    path = tmp_path / 'scores.png'
    plot_score_histograms(dict(one=values, two=[0.2]), dict(one=0.5), 'score', path)
    assert cv2.imread(str(path)).std() > 10
    plot_score_histograms(dict(one=values), {}, 'score', path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize('accuracies, width', [
    (dict(a=[0.5, 0.25], b=[0.5, None]), 11), (dict(a=[None, None], b=[None, None]), 7)])
def test_comparison(tmp_path, accuracies, width):
    """Two panels with accuracies, one without; the colours of what was measured, and no others."""
    for second in ([8., None], [None, None]):
        path = tmp_path / 'comparison.png'
        plot_comparison(['one', 'two'], [4e9, 1e9], dict(a=[10., 5.], b=second), accuracies, path)
        found = colours(path)
        assert cv2.imread(str(path)).shape[1] == width * 120
        assert found[palette(0)] > 50 and (palette(1) in found) == (second[0] is not None)


def test_comparison_of_detectors_that_find_nothing(tmp_path):
    plot_comparison(['one'], [1e9], dict(a=[10.]), dict(a=[0.]), tmp_path / 'nothing.png')
    assert cv2.imread(str(tmp_path / 'nothing.png')).std() > 10


def test_pareto(tmp_path):
    path = tmp_path / 'pareto.png'
    plot_pareto([1., 0.8, 0.8, 0.5], [0.5, 0.45, 0.3, 0.2],
                ['original', 'narrow', 'narrow', 'short'], [True, True, False, True], 'GMACs',
                'mAP', path)
    assert cv2.imread(str(path)).std() > 10
