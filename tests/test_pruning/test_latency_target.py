# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import json

import pytest
import torch
import torch.nn as nn
from block_toys import BlockNet
from pruning_samples import Block, Toy, randomise

from mmgcp.analysis import count_complexity, record_convs
from mmgcp.errors import PruningError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import channel_counts
from mmgcp.pruning import latency_table, latency_target, prune
from mmgcp.pruning.api import check_request, rehearse_pruning
from mmgcp.pruning.cost import CostModel
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.latency_table import LatencyTable, layer_kinds
from mmgcp.pruning.latency_target import TimedCost
from mmgcp.pruning.report import summarize

SHAPE = (3, 16, 16)
BLOCK = 4  # channels that a program computes at once
FIXED = 0.2  # share of the time of a network that lies between its layers


@pytest.fixture
def model():
    layers = dict(a=Block(3, 16, 3), b=Block(16, 24, 3, stride=2), c=Block(24, 32),
                  pred=nn.Conv2d(32, 4, 1))
    return randomise(Toy(lambda net, x: net.pred(net.c(net.b(net.a(x)))), **layers))


def blocks(channels):
    return -(-channels // BLOCK)


def layer_time(layer, positions):
    """Milliseconds of a program that computes in blocks."""
    first, second = channel_counts(layer)
    return blocks(first) * blocks(second) * BLOCK**2 * layer.weight[0, 0].numel() * positions / 1e5


def network_time(model):
    """Milliseconds of a network: its layers, and something that pruning does not change."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    found = sum(layer_time(layers[name], output[2] * output[3])
                for name, _, output in record_shapes(model, layers, SHAPE))
    return found + FIXED


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """A program whose times are exact; a list of the networks that it has run."""
    networks = []

    def run(network, shape, runtime):
        assert (shape, runtime) == (SHAPE, 'torch')
        networks.append(copy.deepcopy(network))
        return network_time(network)

    def run_layer(layer, shape, runtime):
        side = layer(torch.rand(1, *shape)).shape[-1]
        return layer_time(layer, side * side)

    for module in (latency_table, latency_target):
        monkeypatch.setattr(module, 'take_turns', lambda runs, *_, **__: [[run] for run in runs])
    monkeypatch.setattr(latency_target, 'make_run', run)
    monkeypatch.setattr(latency_table, 'layer_run', run_layer)
    return networks


def shorten(model, share, **options):
    options = dict(dict(round_to=BLOCK, compensate=False, input_shape=SHAPE, runtime='torch',
                        criterion=dict(type='mmgcp.BNScale')), **options)
    return prune(model, target_latency=share * network_time(model), **options)


def timed(model):
    units, _ = find_units(model, SHAPE)
    kinds, table = layer_kinds(model, SHAPE), LatencyTable('torch')
    latency_table.fill_table(table, model, kinds, BLOCK, lambda *_: None)
    cost = CostModel(model, record_convs(model, SHAPE), units)
    return cost, TimedCost(cost, kinds, table), {unit.name: unit for unit in units}


def test_shares_are_those_of_the_table(model):
    cost, found, _ = timed(model)
    removed = {'b.conv': torch.arange(8)}
    whole = 256 * 9 * 4 * 16 + 64 * 9 * 16 * 24 + 64 * 24 * 32 + 64 * 32 * 4
    left = 256 * 9 * 4 * 16 + 64 * 9 * 16 * 16 + 64 * 16 * 32 + 64 * 32 * 4
    assert found.shares({}) == (1., 1.)
    assert found.shares(removed) == pytest.approx((cost.shares(removed)[0], left / whole))
    assert cost.macs == record_macs(model) == found.macs  # reports still count MACs


def record_macs(model):
    return count_complexity(model, SHAPE)[1]


def test_a_channel_costs_what_half_of_its_unit_saves(model):
    _, found, units = timed(model)
    less = found.shares({'c.conv': torch.arange(16)})
    assert found.costs(units['c.conv'])[1] == pytest.approx((1 - less[1]) / 16)


@pytest.mark.parametrize('share', [0.8, 0.65, 0.5])
def test_target_is_met_though_the_table_does_not_know_all(model, program, share):
    wanted = share * network_time(model)
    result = shorten(model, share)
    assert network_time(model) == pytest.approx(wanted, rel=0.05)
    assert result.latency['met'] and result.latency['target'] == pytest.approx(wanted)
    assert result.latency['after'] == pytest.approx(network_time(model))
    assert all(row.after % BLOCK == 0 for row in result.layers)
    assert f'{result.latency["after"]:.2f} ms' in summarize(result)
    assert result.report['latency'] == result.latency
    assert json.loads(json.dumps(result.plan.options))['target_latency'] == pytest.approx(wanted)


def test_what_cannot_be_met_is_said(model):
    """The least that a multiple of 16 leaves is far from the target."""
    with pytest.warns(UserWarning, match='takes .* ms in torch, and the target is .* the nearest'):
        result = shorten(model, 0.9, round_to=16)
    assert not result.latency['met']
    assert 'which is the nearest that was found' in summarize(result)


@pytest.mark.parametrize('share, message', [
    (1., 'target_latency is .* ms, but the detector takes .* ms in torch as it is'),
    (0.01, 'the target is .* ms, and the detector takes .* ms: .* of the time of all layers '
     'cannot be reached: these .* at least')])
def test_targets_that_make_no_sense(model, share, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message):
        shorten(model, share)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_table_is_kept(model, tmp_path, program, monkeypatch):
    path = tmp_path / 'table.json'
    first = shorten(copy.deepcopy(model), 0.6, latency_table=path)
    monkeypatch.setattr(latency_table, 'layer_run', None)  # nothing is left to measure
    again = shorten(copy.deepcopy(model), 0.6, latency_table=path)
    assert again.plan.units == first.plan.units
    assert LatencyTable.load(path).runtime == 'torch'


def test_table_of_another_program(model, tmp_path):
    LatencyTable('openvino').save(tmp_path / 'table.json')
    with pytest.raises(PruningError, match='table.json is for openvino, but runtime is torch'):
        shorten(model, 0.6, latency_table=tmp_path / 'table.json')


def test_table_of_another_machine(model, tmp_path, program):
    path = tmp_path / 'table.json'
    shorten(copy.deepcopy(model), 0.6, latency_table=path)
    table = LatencyTable.load(path)
    layers = {name: {key: 10 * value for key, value in times.items()}
              for name, times in table.layers.items()}
    LatencyTable('torch', 'a slow device', layers).save(path)
    whole = 10 * (network_time(model) - FIXED)
    with pytest.warns(UserWarning, match='measured on a slow device, not here'):
        result = prune(model, target_latency=0.5 * whole, runtime='torch', latency_table=path,
                       round_to=BLOCK, input_shape=SHAPE, compensate=False)
    assert result.latency['after'] is None and not result.latency['met']
    assert result.latency['before'] == pytest.approx(whole)
    assert 10 * (network_time(model) - FIXED) == pytest.approx(0.5 * whole, rel=0.1)
    assert 'not measured' in summarize(result)


def test_table_of_another_machine_that_lacks_layers(model, tmp_path):
    LatencyTable('torch', 'a slow device').save(tmp_path / 'table.json')
    with pytest.raises(PruningError, match='is of a slow device, and it lacks 3 kinds .*Conv2d'):
        shorten(model, 0.6, latency_table=tmp_path / 'table.json')


def test_in_steps_only_the_last_one_is_measured(model, program):
    wanted = 0.5 * network_time(model)
    result = shorten(model, 0.5, steps=3)
    assert network_time(model) == pytest.approx(wanted, rel=0.05)
    assert result.latency['met']
    assert program[0].c.conv.out_channels == 32


def test_blocks_count_towards_the_target(program):
    """The target is a time of the whole detector, and what blocks leave of it is measured."""
    net = randomise(BlockNet())
    net.stem[0], net.stem[1] = Block(3, 32, 3), Block(32, 8, 3)
    whole = network_time(net)
    result = shorten(net, 0.7, remove_blocks=['row.0'])
    assert isinstance(net.row[0], nn.Identity)
    assert network_time(net) == pytest.approx(0.7 * whole, rel=0.05)
    assert result.latency['met'] and result.latency['before'] == pytest.approx(whole)
    assert result.latency['after'] == pytest.approx(network_time(net))


def test_blocks_alone_are_fast_enough(program):
    net = randomise(BlockNet())
    with pytest.raises(PruningError, match='takes .* ms in torch without the removed blocks'):
        shorten(net, 0.95, remove_blocks=['row.0'])
    assert not isinstance(net.row[0], nn.Identity)


def test_rehearsal_measures_no_pruned_network(model, program):
    rehearse_pruning(model, target_latency=0.6 * network_time(model), runtime='torch',
                     input_shape=SHAPE, round_to=BLOCK)
    assert len(program) == 1 and model.c.conv.out_channels == 32
    with pytest.raises(PruningError, match='as it is'):
        rehearse_pruning(model, target_latency=2 * network_time(model), runtime='torch',
                         input_shape=SHAPE)


def test_a_program_that_is_not_installed(model, monkeypatch):
    monkeypatch.setattr('mmgcp.deployment.exported.is_installed', lambda name: name == 'onnx')
    with pytest.raises(PruningError, match='target_latency cannot be measured: openvino is needed'):
        shorten(model, 0.5, runtime='openvino')


@pytest.mark.parametrize('runtime, text, message', [
    ('openvino', None, 'target_latency cannot be measured: openvino is needed'),
    ('torch', '', 'the latency table .* is not JSON'),
    ('torch', '[1]', 'is not a latency table')])
def test_wrong_requests_are_found_without_a_model(tmp_path, monkeypatch, runtime, text, message):
    monkeypatch.setattr('mmgcp.deployment.exported.is_installed', lambda name: name == 'onnx')
    path = tmp_path / 'table.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(PruningError, match=message):
        check_request(target_latency=1., runtime=runtime, latency_table=path)


def test_table_of_another_machine_needs_no_program_here(tmp_path, monkeypatch):
    monkeypatch.setattr('mmgcp.deployment.exported.is_installed', lambda name: False)
    path = tmp_path / 'table.json'
    LatencyTable('openvino', 'a slow device').save(path)
    options = check_request(target_latency=1., runtime='openvino', latency_table=path)
    assert options.latency_table == path


def test_table_in_which_nothing_takes_time(model, tmp_path):
    path = tmp_path / 'table.json'
    shorten(copy.deepcopy(model), 0.6, latency_table=path)
    layers = {name: dict.fromkeys(times, 0.)
              for name, times in LatencyTable.load(path).layers.items()}
    LatencyTable('torch', 'a slow device', layers).save(path)
    with pytest.raises(PruningError, match='no layer takes any time'):
        shorten(model, 0.6, latency_table=path)


def test_detector_that_cannot_be_exported(model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(PruningError, match='cannot be measured: .*Toy.* only detectors of one'):
        prune(model, target_latency=0.01, input_shape=SHAPE)
