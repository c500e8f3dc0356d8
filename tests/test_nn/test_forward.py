# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from pruning_samples import Toy

from mmgcp.nn.forward import ShortRuns
from mmgcp.nn.hooks import hooked


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


def test_short_runs_end_behind_what_is_looked_at():
    model = Toy(lambda net, x: net.c(net.b(net.b(net.a(x)))), a=conv(3, 4), b=conv(4, 4),
                c=conv(4, 2))
    ran, runs = [], ShortRuns(model)

    def look(*_):
        ran.append('b')
        runs.seen()

    with hooked([model.b.register_forward_hook(look),
                 model.c.register_forward_hook(lambda *_: ran.append('c'))]):
        for size in (8, 16, 8):
            runs(torch.rand(2, 3, size, size))
    assert ran == ['b', 'b', 'c', 'b', 'b', 'b', 'b']


def test_short_runs_are_whole_if_nothing_is_looked_at():
    model = Toy(lambda net, x: net.a(x), a=conv(3, 4))
    ran, runs = [], ShortRuns(model)
    with hooked([model.a.register_forward_hook(lambda *_: ran.append('a'))]):
        runs(torch.rand(1, 3, 8, 8))
        runs(torch.rand(1, 3, 8, 8))
    assert ran == ['a', 'a']


def test_errors_of_the_model_come_through():
    model = Toy(lambda net, x: net.a(x), a=conv(3, 4))
    with pytest.raises(RuntimeError):
        ShortRuns(model)(torch.rand(1, 2, 8, 8))
