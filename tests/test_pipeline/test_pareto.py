# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The front by hand; tests/test_tools/test_pareto_tool.py runs the whole."""
import pytest
from block_toys import BlockNet
from mmengine.config import Config

from mmgcp.errors import UserError
from mmgcp.pipeline import pareto
from mmgcp.pipeline.comparison import Entry
from mmgcp.pipeline.pareto import Pareto, mark_front
from mmgcp.pipeline.pareto_options import ParetoOptions
from mmgcp.pipeline.pareto_report import format_pareto


def row(name, macs, score, **more):
    return dict(dict(name=name, model=name, blocks=[], share=None, image_size=[64, 64],
                     parameters=10, macs=macs, score=score, cpu_seconds=2.), **more)


def front(rows):
    mark_front(rows)
    return [item['name'] for item in rows if item['front']]


def test_front():
    rows = [row('original', 1000, 0.5), row('worse', 800, 0.3), row('good', 796, 0.4),
            row('costly', 900, 0.4), row('small', 500, 0.1)]
    assert front(rows) == ['original', 'good', 'small']


def test_costs_that_are_the_same_within_a_percent():
    rows = [row('original', 1000, 0.5), row('better', 801, 0.4), row('worse', 798, 0.3),
            row('cheaper', 780, 0.3)]
    assert front(rows) == ['original', 'better', 'cheaper']


def test_low_losses_are_good_and_times_take_the_place_of_macs():
    rows = [row('original', 1000, 1., loss=1., latency_ms=9.),
            row('fast', 900, 2., loss=2., latency_ms=5.),
            row('slow', 800, 2., loss=2., latency_ms=8.)]
    assert front(rows) == ['original', 'fast']


def test_table():
    rows = [row('original', 2e9, 0.5, metric='coco/bbox_mAP', val_images=3),
            row('1-blocks', 1e9, 0.4, metric='coco/bbox_mAP', val_images=3)]
    rows[1]['blocks'] = ['stage.0']
    mark_front(rows)
    lines = format_pareto(Pareto(rows, ['one is not tried']), ParetoOptions()).splitlines()
    assert [cell.strip() for cell in lines[0].split('|')[1:-1]] == [
        'model', 'blocks removed', 'MACs', 'of them', 'parameters', 'bbox_mAP', 'front', 'CPU s']
    assert [cell.strip() for cell in lines[3].split('|')[1:-1]] == [
        '1-blocks', '1', '1.000 G', '50.0%', '0.000 M', '0.400', 'yes', '2']
    assert 'coco/bbox_mAP on the first 3 validation images' in lines[5]
    assert lines[6:] == ['Blocks are removed in this order: stage.0.', 'one is not tried']


def test_table_of_images_of_two_sizes():
    about = dict(metric='coco/bbox_mAP', val_images=3)
    rows = [row('original', 2e9, 0.5, **about),
            row('original@32', 5e8, 0.3, model='original', image_size=[32, 32], **about)]
    mark_front(rows)
    lines = format_pareto(Pareto(rows), ParetoOptions()).splitlines()
    assert [[cell.strip() for cell in line.split('|')[1:-1]][:6] for line in lines[:4:3]] == [
        ['model', 'blocks removed', 'MACs', 'of them', 'parameters', 'images'],
        ['original', '0', '0.500 G', '25.0%', '0.000 M', '32×32']]


def test_images_whose_size_is_not_said_are_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, 'CalibrationBatches', lambda *_: [1])
    monkeypatch.setattr(pareto, 'candidates', lambda *_: [])
    monkeypatch.setattr(pareto, 'find_blocks', lambda *_: None)
    entry = Entry('toy', BlockNet(), Config(dict(test_dataloader=dict(
        dataset=dict(pipeline=[dict(type='Normalize')])))))
    with pytest.raises(UserError, match='cannot be made 64 pixels wide'):
        pareto.try_plans(entry, ParetoOptions(image_widths=[64]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options, message', [
    (dict(shares=[0.]), 'shares must be a list of shares to keep'),
    (dict(depths=[]), 'depths must be a list of numbers of blocks'),
    (dict(image_widths=[100]), 'image_widths must be a list of multiples of 32'),
    (dict(image_widths=[64], val_images=0), 'image_widths are for a test on validation images'),
    (dict(runtime='tensorflow'), 'runtime must be one of'),
])
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        ParetoOptions(**options)
