# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.analysis import latency, measure_latency


class Net(nn.Module):
    """Each run takes as long on the clock as it is told; there are no more runs than these."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.clock = iter(seconds), 100.

    def forward(self, x, mode):
        assert mode == 'tensor' and x.shape == (1, 3, 8, 12)
        assert not self.training and not torch.is_grad_enabled()
        self.clock += next(self.seconds)


@pytest.mark.parametrize('seconds, median, settings', [
    ([9., 9., .1, .5, .3], 300., dict(runs=3, warmup=2)),
    ([9., 9., .1, .5, .3, .2], 250., dict(runs=4, warmup=2)),
    ([9.] * 3 + [.1 * run for run in range(20)], 950., {})])
def test_median_without_warmup(seconds, median, settings, monkeypatch):
    net = Net(seconds).train()
    monkeypatch.setattr(latency.time, 'perf_counter', lambda: net.clock)
    found = measure_latency(net, (3, 8, 12), **settings)
    assert found == pytest.approx(median)
    assert next(net.seconds, None) is None  # all have been measured


def test_time_on_the_real_clock():
    assert measure_latency(Net([0.] * 23), (3, 8, 12)) > 0
