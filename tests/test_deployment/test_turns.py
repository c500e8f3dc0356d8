# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Networks that take turns, on a clock of their own."""
import statistics

import pytest
import torch
import torch.nn as nn

from mmgcp.deployment.timing import speedups, take_turns, torch_run


class Clock:
    """Stands still but while one of its runs takes its time."""

    def __init__(self):
        self.now, self.order = 100., []

    def __call__(self):
        return self.now

    def run(self, name, seconds):
        seconds = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(seconds)

        return run


@pytest.mark.parametrize('seconds, median, settings', [
    ([9., 9., .1, .5, .3], 300., dict(rounds=3, warmup=2)),
    ([9., 9., .1, .5, .3, .2], 250., dict(rounds=4, warmup=2)),
    ([9.] * 3 + [.1 * run for run in range(20)], 950., {})])
def test_median_without_warmup(seconds, median, settings):
    clock = Clock()
    (times, ) = take_turns([clock.run('a', seconds)], clock=clock, **settings)
    assert statistics.median(times) == pytest.approx(median)
    assert len(clock.order) == len(seconds)  # all have been measured


def test_turns():
    """Each round has each of them once; a machine that gets slower changes no ratio."""
    clock = Clock()
    slower = [1., 2., 3., 8.]
    times = take_turns([clock.run('a', slower), clock.run('b', [part / 4 for part in slower])],
                       rounds=3, warmup=1, clock=clock)
    assert [sorted(clock.order[place:place + 2]) for place in range(0, 8, 2)] == [['a', 'b']] * 4
    assert times == [[2000., 3000., 8000.], [500., 750., 2000.]]
    assert speedups(times) == [1., 4.]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, mode):
        assert mode == 'tensor' and x.shape == (1, 3, 8, 12) and not torch.is_grad_enabled()
        self.threads = torch.get_num_threads()
        return [x, (2 * x, )]


def test_threads_are_those_of_before():
    net, before = Net().eval(), torch.get_num_threads()
    outputs = torch_run(net, (3, 8, 12), threads=before + 1)()
    assert net.threads == before + 1 and torch.get_num_threads() == before
    assert [tensor.shape for tensor in outputs] == [(1, 3, 8, 12)] * 2
    assert take_turns([torch_run(net, (3, 8, 12))], rounds=2)[0][0] > 0
