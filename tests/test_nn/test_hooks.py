# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Toy

from mmgcp.nn.hooks import hooked, on_inputs, on_outputs, recording


def chain():
    return Toy(lambda net, x: net.b(F.relu_(net.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def test_hooks_are_removed_also_after_an_error():
    layer, seen = nn.Identity(), []
    with pytest.raises(ValueError):
        with hooked([layer.register_forward_pre_hook(lambda *_: seen.append(0)),
                     layer.register_forward_hook(lambda *_: seen.append(1))]):
            layer(torch.zeros(1))
            raise ValueError
    layer(torch.zeros(1))
    assert seen == [0, 1]


def test_inputs_and_outputs_are_seen_and_replaced():
    model, x, seen = chain(), torch.rand(5, 3), []
    before = model(x)
    with on_inputs(model, {'a': lambda inputs: seen.append(inputs), 'b': torch.zeros_like}):
        assert torch.equal(model(x), model.b.bias.expand(5, 2))
    assert len(seen) == 1 and seen[0] is x
    with on_outputs(model, {'': lambda inputs, output: seen.append((inputs, output)),
                            'b': lambda inputs, output: 2 * output}):
        found = model(x)
    assert torch.equal(found, 2 * before)
    assert seen[1][0] is x and seen[1][1] is found
    assert torch.equal(model(x), before) and len(seen) == 2


class Pair(nn.Module):
    """Returns something else than a tensor."""

    def forward(self, x):
        return x, {'twice': 2 * x}


def test_modules_with_keyword_arguments_alone():
    model, seen = Pair(), []
    with on_outputs(model, {'': lambda *args: seen.append(args)}):
        model(x=1)
    assert seen == [(None, (1, {'twice': 2}))]


@pytest.mark.parametrize('watch', [on_inputs, on_outputs])
def test_a_name_that_does_not_exist_leaves_no_hook(watch):
    model, seen = chain(), []
    with pytest.raises(AttributeError):
        with watch(model, {'a': seen.append, 'c': seen.append}):
            pass
    model(torch.rand(5, 3))
    assert not seen


def test_recording_copies_what_is_overwritten_later():
    model, x = chain(), torch.rand(5, 3)
    with recording(model, ['a', 'b']) as outputs:
        model(x)
        result = model(x + 1)
    assert list(outputs) == ['a', 'b'] and [len(found) for found in outputs.values()] == [2, 2]
    assert torch.equal(outputs['a'][1], model.a(x + 1)) and bool((outputs['a'][1] < 0).any())
    assert torch.equal(outputs['b'][1], result)
    gradient, = torch.autograd.grad(outputs['a'][0].sum(), model.a.bias)
    assert gradient.tolist() == [5.] * 4


def test_recording_of_inputs_and_of_the_very_tensors():
    model, x, seen = chain(), torch.rand(5, 3), []
    with recording(model, ['a', 'b'], inputs=True, copy=False,
                   then=lambda: seen.append(1)) as inputs:
        model(x)
    assert inputs['a'][0] is x and torch.equal(inputs['b'][0], model.a(x).relu())
    assert seen == [1, 1]


def test_recording_of_anything():
    model = nn.Sequential(Pair())
    with recording(model, ['0'], copy=False) as outputs:
        model(1)
    assert outputs == {'0': [(1, {'twice': 2})]}
