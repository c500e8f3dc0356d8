# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch
import torch.nn as nn
from pruning_samples import Block, Toy

from mmgcp.nn.calls import (
    following_norms,
    have_own_norms,
    producer_of,
    recording_calls,
    set_producer,
)


def conv():
    return nn.Conv2d(3, 3, 1)


def test_the_producer_of_a_tensor_is_forgotten_when_it_changes():
    tensor = torch.zeros(2)
    assert producer_of(tensor) is None
    set_producer(tensor, 'layer')
    assert producer_of(tensor) == 'layer'
    assert producer_of(tensor * 2) is None
    tensor.add_(1)
    assert producer_of(tensor) is None


def shared_head():
    """A convolution that runs three times, twice followed by a BatchNorm."""
    return Toy(lambda net, x: [net.one(net.a(x)), net.two(net.a(net.b(x))), net.a(x) + 1,
                               net.two(net.c(x) + 1)],
               a=conv(), b=conv(), c=conv(), unused=conv(),
               one=nn.BatchNorm2d(3), two=nn.BatchNorm2d(3)).eval()


def test_norms_that_follow_layers():
    found = following_norms(shared_head(), ['a', 'b', 'c', 'unused'], (3, 8, 8))
    assert found == dict(a=['one', 'two'], b=[], c=[], unused=[])


def test_norms_of_a_usual_block():
    model = Toy(lambda net, x: net.block(x), block=Block(3, 4)).train()
    assert following_norms(model, ['block.conv']) == {'block.conv': ['block.bn']}
    assert model.block.bn.training and int(model.block.bn.num_batches_tracked) == 0


def test_calls_have_their_notes_and_norms():
    model, seen = shared_head(), []
    with recording_calls(model, dict(a=lambda inputs, output: (inputs.shape, output.shape)),
                         then=lambda: seen.append(1)) as calls:
        for size in (4, 8):
            model(torch.rand(1, 3, size, size))
    assert list(calls) == ['a']
    assert [call.norms for call in calls['a']] == [['one'], ['two'], []] * 2
    assert [call.note for call in calls['a']] == [
        ((1, 3, size, size), (1, 3, size, size)) for size in (4, 4, 4, 8, 8, 8)]
    assert len(seen) == 10 and calls.foreign == {'two'}


def test_layers_with_norms_of_their_own():
    runs = dict(plain=[('a', )], levels=[('b', ), ('c', 'd'), ('b', )], sometimes=[('e', ), ()],
                one=[('f', )], other=[('f', )], foreign=[('g', )], unused=[])
    assert have_own_norms(runs, {'g'}) == {'plain', 'levels', 'unused'}
