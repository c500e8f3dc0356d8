# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from pruning_samples import Toy, randomise

from mmgcp.pruning.layerwise.auxiliary import lookahead
from mmgcp.pruning.layerwise.auxiliary.lookahead import OutputsAhead

# The layers a, b, c, d put out 4 * 8 * 8 floats for an image
BYTES = 2 * 4 * 8 * 8 * 4
ORDER = dict(first=['a'], second=['b', 'c'], third=['c'], fourth=['d', 'a'])


@pytest.fixture
def model():
    return randomise(Toy(lambda net, x: net.d(net.c(net.b(net.a(x))).relu_()),
                         **{name: nn.Conv2d(3 if name == 'a' else 4, 4, 1) for name in 'abcd'}))


@pytest.fixture
def runs(monkeypatch):
    """The layers that each run records."""
    runs, real = [], lookahead.record_outputs
    monkeypatch.setattr(lookahead, 'record_outputs', lambda model, images, calls: (
        runs.append(''.join(calls)), real(model, images, calls))[1])
    return runs


def batch(seed):
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ask(ahead, model, batches):
    """What all units get for batches, which is right."""
    for name, layers in ORDER.items():
        for number, images in enumerate(batches):
            with torch.no_grad():
                found = ahead(model, name, number, images)
                x, outputs = images, {}
                for layer in 'abcd':
                    outputs[layer] = getattr(model, layer)(x)
                    x = outputs[layer].relu() if layer == 'c' else outputs[layer]
            assert list(found) == layers
            for layer in layers:
                assert len(found[layer]) == 1 and torch.equal(found[layer][0], outputs[layer])


@pytest.mark.parametrize('memory, expected', [
    (0, ['a', 'a', 'bc', 'bc', 'c', 'c', 'da', 'da']),
    # b, c, d of the first batch take it all, until b goes before the third set
    (3 * BYTES, ['abcd', 'a', 'bc', 'cd', 'a', 'a']),
    (8 * BYTES, ['abcd', 'abcd'])])
def test_runs(model, runs, memory, expected):
    ahead = OutputsAhead(ORDER, dict.fromkeys('abcd', 1), dict.fromkeys('abcd', BYTES), memory)
    ask(ahead, model, [batch(0), batch(1)])
    assert runs == expected
    kept = sum(tensor.nelement() * 4 for _, tensors in ahead._kept.values() for tensor in tensors)
    assert kept <= memory


def test_another_batch_under_a_number(model, runs):
    ahead = OutputsAhead(ORDER, dict.fromkeys('abcd', 1), dict.fromkeys('abcd', BYTES), 1e9)
    with torch.no_grad():
        ahead(model, 'first', 0, batch(0))
        found = ahead(model, 'second', 0, batch(1))
        assert torch.equal(found['b'][0], model.b(model.a(batch(1))))
    assert len(runs) == 2
