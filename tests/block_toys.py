# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Tiny networks of blocks, with a loss."""
import torch
import torch.nn as nn
from pruning_samples import Block, randomise, tensors

from mmgcp.nn.training_loss import Batch

SHAPE = (3, 16, 16)


class Shortcut(nn.Module):
    """Two layers beside a shortcut, which may be scaled, and with an activation behind the sum."""

    def __init__(self, channels, scale=None, act=None):
        super().__init__()
        self.first = Block(channels, channels + 2, 3)
        self.last = Block(channels + 2, channels)
        self.act = act
        if scale is not None:
            self.alpha = nn.Parameter(torch.tensor([scale]))

    def forward(self, x):
        x = getattr(self, 'alpha', 1) * x + self.last(self.first(x))
        return x if self.act is None else self.act(x)


class Gated(Shortcut):
    """A block that reads something else, too."""

    def forward(self, x, gate):
        return x + gate * self.last(self.first(x))


class BlockNet(nn.Module):
    """A detector whose blocks can go, and some that cannot."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Block(3, 8, 3, nn.ReLU), Block(8, 8, 3, nn.ReLU))
        self.row = nn.Sequential(Shortcut(8), Shortcut(8, 0.7), Shortcut(8))
        self.down = Block(8, 6, 3, nn.ReLU, stride=2)
        self.single = Shortcut(6, act=nn.ReLU())
        self.twice = Shortcut(6)
        self.gated = Gated(6)
        self.pred = nn.Conv2d(6, 4, 1)

    def forward(self, x, data_samples=None, mode='tensor'):
        x = self.stem(x.to(self.pred.weight.dtype))
        x = self.single(self.down(self.row(x)))
        x = self.twice(self.twice(x))
        x = self.gated(x, 0.5)
        outputs = self.pred(x)
        if mode == 'tensor':
            return outputs
        assert mode == 'loss'
        targets = data_samples['targets'].to(outputs)
        return dict(loss=(outputs.mean((1, 2, 3)) - targets).square().sum())

    def parse_losses(self, losses):
        return sum(losses.values()), losses


def block_net(seed=0):
    return randomise(BlockNet(), seed).eval()


def make_batches(number=2, images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Batch(torch.rand(images, *SHAPE, generator=generator),
                  dict(targets=torch.randn(images, generator=generator)))
            for _ in range(number)]


@torch.no_grad()
def outputs(model, seed=5):
    image = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    return tensors([model(image)])
