# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import json

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.pruning import prune
from mmgcp.pruning.report import summarize, write_report

GROUPS = [dict(name='one', modules=['a'], threshold=0.5),
          dict(name='two', modules=['[bc]'], threshold=0.45)]


@pytest.fixture
def model():
    model = randomise(Toy(
        lambda net, x: net.pred(net.raw(net.c(net.a(x) + net.b(x)))), a=Block(3, 4),
        b=Block(3, 4), c=Block(4, 10), raw=nn.Conv2d(10, 6, 1, bias=False),
        pred=nn.Conv2d(6, 2, 1)))
    model.a.bn.weight.data = torch.tensor([0.1, 0.9, 0.1, 0.9])
    model.b.bn.weight.data = torch.tensor([0.1, 0.9, 0.9, 0.1])
    model.c.bn.weight.data = torch.linspace(0.1, 1., 10)
    return model


@pytest.fixture
def result(model):
    return prune(model, GROUPS, input_shape=(3, 16, 16))


def test_results_without_a_picture(result, tmp_path, monkeypatch):
    """One that cannot be drawn is not worth the hours before."""

    def fail(*_):
        raise ValueError('supplied range of [nan, nan] is not finite')

    monkeypatch.setattr('mmgcp.pruning.report.plot_score_histograms', fail)
    with pytest.warns(UserWarning, match='scores.png has not been drawn: ValueError: supplied'):
        write_report(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'channels.png', 'report.json', 'report.md']


def test_layers_by_hand(result):
    assert sorted(tuple(row) for row in result.layers) == [
        ('a.conv', 'one', 4, 3), ('b.conv', 'two', 4, 3), ('c.conv', 'two', 10, 6),
        ('pred', '', 2, 2), ('raw', '', 6, 6)]


def test_figures_by_hand(result):
    before = 2 * (12 + 8) + 40 + 20 + 60 + 14
    after = 2 * (9 + 6) + 18 + 12 + 36 + 14
    assert result.params == [before, after]
    assert result.macs == [256 * (24 + 40 + 60 + 12), 256 * (18 + 18 + 36 + 12)]


def test_summary(result):
    lines = summarize(result).splitlines()
    assert lines[0].split() == ['layer', 'group', 'threshold', 'channels', 'kept']
    rows = [line.split() for line in lines[1:4]]
    assert sorted(rows) == [
        ['(not', 'pruned)', '-', '8', '->', '8', '100.0%'],
        ['one', '0.5', '4', '->', '3', '75.0%'],
        ['two', '0.45', '14', '->', '9', '64.3%']]
    assert any(line.startswith('parameters') and '(-36.8%)' in line for line in lines)
    assert any(line.startswith('MACs') and '(-38.2%)' in line for line in lines)
    assert len(set(lines)) == len(lines)


def test_summary_of_what_is_left_alone(result):
    """The three most frequent reasons, and how many others there are."""
    reasons = {'why': 3, 'because': 2, 'therefore': 1}
    result.plan.skipped.update({f'{reason}{number}': reason for reason, times in reasons.items()
                                for number in range(times)})
    lines = summarize(result).splitlines()
    assert lines[6:10] == ['channels chosen by      BNScale, global',
                           '3 layers left alone: why', '2 layers left alone: because',
                           '1 layers left alone: therefore']
    result.plan.skipped.update(x='so')
    assert 'layers left alone for 1 other reasons are in the report' in summarize(result)


@pytest.mark.pictures
def test_report_files(result, tmp_path):
    write_report(result, tmp_path)
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report == result.report
    assert report['params'] == dict(before=174, after=110)
    assert report['thresholds'] == dict(one=0.5, two=0.45)
    assert report['uncompensated'] == ['raw']
    assert set(report['skipped']) == {'pred'}
    assert report['options']['criterion'] == dict(type='mmgcp.BNScale')
    assert dict(layer='c.conv', group='two', before=10, after=6) in report['layers']
    text = (tmp_path / 'report.md').read_text()
    assert summarize(result) in text
    assert '| c.conv | two | 10 | 6 | 60% |' in text
    assert '- pred: its outputs are the predictions' in text
    assert '## Could not absorb all that removed channels emitted\n\n- raw' in text
    assert '![channels](channels.png)' in text and '![scores](scores.png)' in text
    for name in ('channels.png', 'scores.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


def test_report_of_fitted_layers(model, tmp_path):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = prune(model, GROUPS, input_shape=(3, 16, 16), calibration=[images])
    assert result.fits == dict.fromkeys(('c.conv', 'raw', 'pred'), 'kernel')
    assert result.report['fits'] == result.fits
    assert summarize(result).splitlines()[-1] == '3 layers fitted to their original outputs ' \
        '(3 kernel)'
    write_report(result, tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '| c.conv | two | 10 | 6 | 60% | kernel |' in text
    assert '| a.conv | one | 4 | 3 | 75% |  |' in text


def test_no_scores_where_a_plan_was_given(model, result, tmp_path):
    model = randomise(Toy(model.run, a=Block(3, 4), b=Block(3, 4), c=Block(4, 10),
                          raw=nn.Conv2d(10, 6, 1, bias=False), pred=nn.Conv2d(6, 2, 1)))
    again = prune(model, plan=copy.deepcopy(result.plan), input_shape=(3, 16, 16))
    write_report(again, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'channels.png', 'report.json', 'report.md']
    text = (tmp_path / 'report.md').read_text()
    assert 'scores' not in text and '![channels](channels.png)' in text
    assert '| c.conv | two | 10 | 6 | 60% |' in text
    assert json.loads((tmp_path / 'report.json').read_text())['thresholds'] == dict(
        one=0.5, two=0.45)
    assert summarize(again) == summarize(result)


def test_report_of_a_group_that_keeps_all(tmp_path):
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 4),
                          pred=nn.Conv2d(4, 2, 1)))
    result = prune(model, [dict(name='one', modules=['a'], ratio=0.)], input_shape=(3, 8, 8))
    write_report(result, tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text())['thresholds'] == dict(one=None)
    assert result.params[0] == result.params[1]


@pytest.mark.pictures
def test_report_of_a_group_without_scores(tmp_path):
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 4),
                          pred=nn.Conv2d(4, 2, 1)))
    result = prune(model, [dict(name='one', modules=['pred'], ratio=0.5)], input_shape=(3, 8, 8))
    write_report(result, tmp_path)
    assert '(not pruned)' in summarize(result)
    assert (tmp_path / 'scores.png').stat().st_size > 1000
