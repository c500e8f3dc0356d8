# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import shutil

import pytest
from scripts import run_here

from mmgcp.analysis.network import DrawnLayer
from mmgcp.errors import UserError
from mmgcp.pipeline.network_drawing import draw_network, in_running_order, read_report

TOOL = 'analysis_tools/draw_network.py'


def row(layer, group='x', before=4, after=2):
    return dict(layer=layer, group=group, before=before, after=after)


def test_running_order():
    """A layer that does not run follows the one before it in the report."""
    rows = [row('a'), row('gone'), row('b'), row('c')]
    found = in_running_order(rows, dict(b=(8, 8), unknown=None, a=(4, 4), c=None))
    assert found == [DrawnLayer('b', 'x', 4, 2, (8, 8)), DrawnLayer('a', 'x', 4, 2, (4, 4)),
                     DrawnLayer('gone', 'x', 4, 2), DrawnLayer('c', 'x', 4, 2)]


def test_nothing_of_a_report_runs():
    assert [layer.name for layer in in_running_order([row('a'), row('b')], {})] == ['a', 'b']


@pytest.fixture
def drawn(pruned_folder, tmp_path, monkeypatch):
    """What of a pruned folder is drawn."""
    calls = []
    monkeypatch.setattr('mmgcp.pipeline.network_drawing.write_network_html',
                        lambda *args: (calls.append(args), args[2].write_text('')))
    draw_network(pruned_folder, tmp_path)
    return calls[0]


def test_layers_of_yolov4(drawn, pruned_folder):
    """Backbone, neck and head in this order, the shortcut before the layer that reads both."""
    layers, title = drawn[:2]
    report = json.loads((pruned_folder / 'report.json').read_text())
    assert sorted(layer.name for layer in layers) == sorted(
        item['layer'] for item in report['layers'])
    names = [layer.name for layer in layers]
    parts = list(dict.fromkeys(layer.part for layer in layers))
    assert parts == ['backbone', 'neck', 'bbox_head']
    assert names.index('backbone.stage1.1.short_conv.conv') < names.index(
        'backbone.stage1.1.final_conv.conv')
    sizes = {layer.name: layer.size for layer in layers}
    assert sizes['backbone.stem.conv'] == tuple(
        2 * side for side in sizes['backbone.stage1.0.conv'])
    before, after = report['params']['before'], report['params']['after']
    assert f'({after / before - 1:+.1%})' in title


def test_tool(pruned_folder, tmp_path):
    """It draws what tools/prune.py has drawn."""
    shutil.copytree(str(pruned_folder), str(tmp_path / 'copy'))
    page = (tmp_path / 'copy' / 'network.html').read_text()
    (tmp_path / 'copy' / 'network.html').unlink()
    result = run_here(TOOL, tmp_path / 'copy')
    assert result.returncode == 0, result.stderr
    assert f'written: {tmp_path}/copy/network.png, {tmp_path}/copy/network.html' in result.stdout
    assert (tmp_path / 'copy' / 'network.html').read_text() == page


@pytest.mark.parametrize('content, words', [
    (None, 'cannot be read'), ('{', 'is not JSON'), ('[]', 'has no layers'),
    ('{"layers": []}', 'has no layers'), ('{"layers": [3]}', 'but one is 3'),
    (json.dumps(dict(layers=[row('a', before=0, after=0)])), "'before': 0"),
    (json.dumps(dict(layers=[row('a', after=5)])), "'after': 5"),
    (json.dumps(dict(layers=[row(3)])), "'layer': 3")])
def test_wrong_report(tmp_path, content, words):
    if content is not None:
        (tmp_path / 'report.json').write_text(content)
    with pytest.raises(UserError, match=words):
        read_report(tmp_path / 'report.json')


@pytest.mark.parametrize('arguments, words', [
    (['nowhere'], 'there is no folder nowhere'), (['.', '--out', 'nowhere'], 'no folder nowhere'),
    (['.'], 'report.json cannot be read')])
def test_wrong_folders(tmp_path, arguments, words):
    result = run_here(TOOL, *arguments, cwd=tmp_path)
    assert result.returncode == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_config_that_is_gone(tmp_path):
    (tmp_path / 'report.json').write_text(json.dumps(dict(layers=[row('a')])))
    with pytest.raises(UserError, match=r'there is no .*pruned\.py: give the folder'):
        draw_network(tmp_path)
