# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, choose, difference, randomise, residual_toy, run

from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.pruning.masking import Snapshot, channels_off, check_same_predictions
from mmgcp.pruning.structures import PruningError
from mmgcp.pruning.surgery import remove_channels

SIZE = (3, 16, 16)


def test_channels_off_is_as_without_their_weights():
    model = residual_toy()
    sets, _ = find_coupled_channels(model, SIZE)
    removed = {'stem.conv': torch.tensor([1, 5]), 'a1.conv': torch.tensor([0])}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for reader in (expected.a1.conv, expected.a2.conv, expected.pred):
            reader.weight[:, [1, 5]] = 0
        expected.b1.conv.weight[:, 0] = 0
    before = run(model, 16)
    with channels_off(model, sets, removed):
        assert difference(run(model, 16), run(expected, 16)) < 1e-12
    assert difference(run(model, 16), before) == 0
    assert difference(run(expected, 16), before) > 0.01


def test_snapshot_takes_everything_back():
    model = residual_toy()
    sets, _ = find_coupled_channels(model, SIZE)
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(
        keep_vars=True).items()}
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.a1.bn.running_mean += 1
        model.pred.bias += 1
    remove_channels(model, sets, choose(sets, 3))
    model.stem.__class__ = type('Other', (Block, ), {})
    assert model.stem.conv.out_channels < 8
    snapshot.restore()
    assert type(model.stem) is Block and model.stem.conv.out_channels == 8
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is tensors[name][0] and torch.equal(value, tensors[name][1])


def test_different_predictions_are_refused():
    check_same_predictions([torch.ones(3)], [torch.ones(3) + 1e-5])
    for found in (torch.ones(3) + 0.1, torch.ones(4), torch.full((3, ), float('nan'))):
        with pytest.raises(PruningError, match='register_attribute_rule'):
            check_same_predictions([torch.ones(3)], [found])


def test_linear_layers_have_their_channels_last():
    model = randomise(Toy(
        lambda net, x: net.pred(net.f(net.a(x).flatten(2).transpose(1, 2))), a=Block(3, 4),
        f=nn.Linear(4, 6), pred=nn.Linear(6, 2)))
    sets, _ = find_coupled_channels(model, SIZE)
    removed = {'f': torch.tensor([0, 4])}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.pred.weight[:, [0, 4]] = 0
    with channels_off(model, sets, removed):
        assert difference(run(model, 16), run(expected, 16)) < 1e-12
