# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from test_dynamic_sparsity_hook import TinyModel, make_runner

from mmgcp.errors import UserError
from mmgcp.sparsity.channels import LayerScales
from mmgcp.sparsity.divergence import FiniteWatch
from mmgcp.sparsity.logs import draw_gamma_histogram


class Diverging(TinyModel):
    """Gets gradients of scale factors that are not finite in some of its runs, from 1 on."""

    def __init__(self, value=float('nan'), **layers):
        super().__init__()
        self.number = 0
        for name, number in layers.items():

            def change(grad, number=number):
                return grad.index_fill(0, torch.tensor([1]), value) if (
                    number == self.number) else grad

            self.get_submodule(name).weight.register_hook(change)

    def forward(self, inputs, mode='tensor'):
        self.number += 1
        return super().forward(inputs, mode)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('log_interval', [1, 50])
def test_training_is_stopped(tmp_path, penalty, value, log_interval):
    """At the next log or at the end of the epoch; what was saved before stays."""
    runner = make_runner(
        tmp_path, dict(rate=0.01, log_interval=log_interval, penalty=penalty),
        Diverging(value, bn2=5), iters=3, epochs=4,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)))
    with pytest.raises(UserError) as caught:
        runner.train()
    assert str(caught.value) == (
        'the training has diverged: from iteration 5 on, scale factors of bn2 are not finite; a '
        'smaller learning rate, or a smaller rate of the sparsity, may help')
    assert runner.model.number == (5 if log_interval == 1 else 6)
    assert checkpoints(tmp_path) == ['epoch_1.pth']


def test_several_layers(tmp_path):
    runner = make_runner(tmp_path, dict(rate=0.01), Diverging(bn1=2, bn2=2), iters=3)
    with pytest.raises(UserError, match='from iteration 2 on, .* of bn1 and of 1 other layers '):
        runner.train()


def test_checkpoint_between_two_logs(tmp_path):
    """A diverged state is not saved."""
    runner = make_runner(
        tmp_path, dict(rate=0.01), Diverging(bn2=2), iters=9, default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False)))
    with pytest.raises(UserError, match='from iteration 2 on'):
        runner.train()
    assert checkpoints(tmp_path) == [] and runner.model.number == 3


def test_learning_rate_that_is_too_large(tmp_path):
    runner = make_runner(tmp_path, dict(rate=1.), iters=9,
                         optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e38)))
    with pytest.raises(UserError, match='the training has diverged: from iteration '):
        runner.train()


def test_watch():
    """The first iteration counts, whatever comes later; also of frozen layers."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    second.requires_grad_(False)
    watch = FiniteWatch([LayerScales('first', first), LayerScales('second', second)])
    watch.look(1)
    watch.check()
    second.data[2] = -float('inf')
    watch.look(2)
    second.data.fill_(1)
    first.data.fill_(float('nan'))
    watch.look(3)
    with pytest.raises(UserError, match='from iteration 2 on, scale factors of second are'):
        watch.check()


@pytest.mark.parametrize('error', [ValueError('supplied range of [nan, nan] is not finite'),
                                   OSError(28, 'No space left on device'), MemoryError()])
def test_picture_ends_no_training(tmp_path, monkeypatch, error):

    def fail(*_, **__):
        raise error

    monkeypatch.setattr('mmgcp.sparsity.logs.draw_gamma_histogram', fail)
    runner = make_runner(tmp_path, dict(rate=0.01), iters=2, epochs=2)
    runner.train()
    assert runner.iter == 4
    log = next(tmp_path.glob('*/*.log')).read_text()  # where the same warning is not repeated
    assert f'Sparsity: there is no histogram of this epoch: {type(error).__name__}: {error}' in log


@pytest.mark.parametrize('values', [[float('nan')] * 3, [float('inf'), 0.5, float('nan')]])
def test_histogram_of_what_is_finite(values):
    image = draw_gamma_histogram(np.array(values), 0.01, 'epoch 1')
    assert image.shape == (480, 640, 3) and image.std() > 10
