# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import os

import torch
import torch.nn as nn

from mmgcp.analysis import measure_peak_memory

BYTES = 4


class Net(nn.Module):
    """Has three tensors of N numbers at most, one of them twice as long: -x is gone by then."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.twin = self.weight
        self.register_buffer('mean', torch.zeros(50))

    def forward(self, x):
        y = x.neg()
        z = y.exp()
        del y
        return torch.cat((z, z))


@torch.no_grad()
def test_peak_by_hand(capfd):
    net, image = Net(), torch.zeros(4096)
    found = [measure_peak_memory(net, lambda: net(image)) for _ in range(2)]
    assert found == [BYTES * (3 * 4096 + 1000 + 50)] * 2  # the same each time
    printed, complaints = capfd.readouterr()
    # PyTorch 1.13's profiler has no level that silences these
    complaints = [line for line in complaints.splitlines() if not line.startswith('STAGE:')]
    assert printed == '' and complaints == [] and 'KINETO_LOG_LEVEL' not in os.environ


@torch.no_grad()
def test_what_is_freed_on_the_way():
    """A chain of any length has two tensors at a time."""
    def run(length):
        x = torch.zeros(2048)
        for _ in range(length):
            x = x.neg()
        return x

    assert [measure_peak_memory(nn.Identity(), lambda length=length: run(length))
            for length in (1, 5)] == [BYTES * 2 * 2048] * 2
