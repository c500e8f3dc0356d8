# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
import torch.nn as nn
from pruning_samples import Block, Toy

from mmgcp.errors import PruningError
from mmgcp.pruning import latency_table
from mmgcp.pruning.latency_table import LatencyTable, fill_table, layer_kinds, widths

GRID = {(16, 16): 1., (16, 48): 3., (32, 16): 2., (32, 48): 8.}
SHAPE = (3, 16, 24)


def quiet(*_):
    pass


@pytest.mark.parametrize('inputs, outputs, expected', [
    (16, 16, 1.), (32, 48, 8.), (24, 16, 1.5), (16, 32, 2.), (24, 32, (1.5 + 5.5) / 2),
    (8, 16, 1.), (64, 16, 2.), (20, 24, 0.75 * 1.5 + 0.25 * 3.5)])
def test_interpolation_by_hand(inputs, outputs, expected):
    assert LatencyTable('torch', layers=dict(conv=GRID)).time('conv', inputs, outputs) == (
        pytest.approx(expected))


@pytest.mark.parametrize('width, expected', [(8, 1.), (16, 1.), (24, 1.5), (32, 2.), (99, 2.)])
def test_depthwise_layers_have_one_width(width, expected):
    table = LatencyTable('torch', layers=dict(conv={(16, 16): 1., (32, 32): 2.}))
    assert table.time('conv', width, width) == expected


@pytest.mark.parametrize('most, multiple, step, expected', [
    (64, 16, 1, [16, 32, 48, 64]), (256, 16, 1, [16, 64, 128, 192, 256]), (24, 16, 1, [16, 24]),
    (12, 16, 1, [12]), (255, 16, 1, [16, 64, 128, 192, 255]), (3, 16, 1, [3]),
    (96, 16, 3, [48, 96]), (8, 1, 1, [1, 2, 4, 6, 8])])
def test_widths(most, multiple, step, expected):
    assert widths(most, multiple, step) == expected


def test_file(tmp_path):
    table = LatencyTable('torch', 'a machine', dict(conv=GRID, fc={(4, 4): 0.5}))
    table.save(tmp_path / 'table.json')
    assert LatencyTable.load(tmp_path / 'table.json') == table


@pytest.mark.parametrize('change, message', [
    (dict(format='plan'), 'is not a latency table'), (dict(version=2), 'of version 2'),
    (dict(runtime=3), 'runtime of .* cannot be 3'),
    (dict(layers=[]), r'layers of .* cannot be \[\]'),
    (dict(layers=dict(conv=[[16, 16]])), r"layer 'conv', but has \[16, 16\]"),
    (dict(layers=dict(conv=[[16, 0, 1.]])), r'but has \[16, 0, 1.0\]'),
    (dict(layers=dict(conv=[[16, 16, -1.]])), 'but has .*-1'),
    (dict(layers=dict(conv=[[16, 16, 'x']])), 'but has'),
    (dict(layers=dict(conv=3)), 'but has None'),
    (dict(layers=dict(conv=[])), "gaps in what it says of layer 'conv'"),
    (dict(layers=dict(conv=[[16, 16, 1.], [32, 48, 1.]])), 'gaps')])
def test_wrong_files(tmp_path, change, message):
    path = tmp_path / 'table.json'
    LatencyTable('torch', 'here', dict(conv=GRID)).save(path)
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **change)))
    with pytest.raises(PruningError, match=message):
        LatencyTable.load(path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(PruningError, match='the latency table .* cannot be read'):
        LatencyTable.load(tmp_path / 'absent.json')


@pytest.fixture
def model():
    return Toy(lambda net, x: net.fc(net.c(net.b(net.a(x))).mean((2, 3))) + net.b(x).mean(),
               a=Block(3, 3, 3), b=nn.Conv2d(3, 3, 3, 2, 1, groups=3), c=nn.Conv2d(3, 8, 1),
               fc=nn.Linear(8, 2))


def test_kinds_are_what_times_depend_on(model):
    kinds = layer_kinds(model, SHAPE)
    assert {name: len(several) for name, several in kinds.items()} == {
        'a.conv': 1, 'b': 2, 'c': 1, 'fc': 1}
    (first, again), (fc, ) = kinds['b'], kinds['fc']
    assert first == again and first.tied and first.shape == (16, 24) and fc.shape == ()
    assert 'stride=2x2' in first.name and 'depthwise' in first.name and 'map=16x24' in first.name
    built = first.make(5, 5)
    assert built.groups == 5 and built.stride == (2, 2) and built.kernel_size == (3, 3)


@pytest.fixture
def fake(monkeypatch):
    """Layers take as many milliseconds as they have weights; a list of what is measured."""
    measured = []

    def run(layer, shape, runtime):
        measured.append((type(layer).__name__, runtime))
        return layer.weight.numel()

    monkeypatch.setattr(latency_table, 'layer_run', run)
    monkeypatch.setattr(latency_table, 'take_turns', lambda runs, *_, **__: [[run] for run in runs])
    return measured


def test_only_what_is_missing_is_measured(model, fake):
    table, kinds = LatencyTable('torch'), layer_kinds(model, SHAPE)
    assert fill_table(table, model, kinds, 2, quiet)
    assert [table.time(kinds[name][0].name, *channels) for name, *channels in (
        ('c', 3, 8), ('c', 3, 4), ('b', 3, 3), ('fc', 8, 2))] == [24, 12, 27, 16]
    count = len(fake)
    assert not fill_table(table, model, kinds, 2, quiet) and len(fake) == count
    del table.layers[kinds['fc'][0].name]
    assert fill_table(table, model, kinds, 2, quiet)
    assert set(fake[count:]) == {('Linear', 'torch')}
