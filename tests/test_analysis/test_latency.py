# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.analysis import latency, measure_latency


class Net(nn.Module):
    """Counts its runs, each of which takes as long on the clock as it is told."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.runs, self.clock = seconds, 0, 100.

    def forward(self, x, mode):
        assert mode == 'tensor' and x.shape == (1, 3, 8, 12)
        assert not self.training and not torch.is_grad_enabled()
        self.clock += self.seconds[self.runs]
        self.runs += 1


@pytest.mark.parametrize('seconds, median', [([9., 9., .1, .5, .3], 300.),
                                             ([9., 9., .1, .5, .3, .2], 250.)])
def test_median_without_warmup(seconds, median, monkeypatch):
    net = Net(seconds).train()
    monkeypatch.setattr(latency.time, 'perf_counter', lambda: net.clock)
    found = measure_latency(net, (3, 8, 12), runs=len(seconds) - 2, warmup=2)
    assert found == pytest.approx(median)
    assert net.runs == len(seconds)


def test_default_number_of_runs():
    net = Net([0.] * 23)
    assert measure_latency(net, (3, 8, 12)) > 0
    assert net.runs == 23
