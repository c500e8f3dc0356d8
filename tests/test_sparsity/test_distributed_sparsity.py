# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_dynamic_sparsity_hook import TinyModel
from train_on_rank import HOOKS, ITERS, batches

from mmgcp.registry import TASK_UTILS

SCRIPT = Path(__file__).with_name('train_on_rank.py')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What two processes have at the end."""
    if not torch.distributed.is_available():
        pytest.skip('torch has no distributed package')
    folder = tmp_path_factory.mktemp('ranks')
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', str(SCRIPT), str(rank), '2', str(folder)],
            env=dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo'),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return [torch.load(str(folder / f'{rank}.pth')) for rank in range(2)]


@pytest.mark.parametrize('name', HOOKS)
def test_ranks_are_equal(ranks, name):
    first, second = (result[name] for result in ranks)
    assert first['rate'] == second['rate']
    for key, value in first['weights'].items():
        assert torch.equal(value, second['weights'][key]), key


def train_by_hand(hook):
    """One process, with the mean of the gradients that both batches have."""
    model = TinyModel()
    model.train()
    gammas = [model.bn1.weight, model.bn2.weight]
    sizes = [len(gamma) for gamma in gammas]
    schedule = TASK_UTILS.build(dict(hook['schedule'], _scope_='mmgcp'))
    for iteration, pair in enumerate(zip(batches(0), batches(1))):
        model.zero_grad()
        for batch in pair:
            (model(**batch)['loss'] / 2).backward()

        def rates(iteration=iteration):
            magnitudes = torch.cat(gammas).detach().abs()
            found = schedule.rates(magnitudes, hook['rate'], iteration / ITERS)
            return (found * torch.ones(sum(sizes))).split(sizes)

        with torch.no_grad():
            if 'penalty' not in hook:
                for gamma, rate in zip(gammas, rates()):
                    gamma.grad += rate * gamma.sign()
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
            if 'penalty' in hook:
                for gamma, rate in zip(gammas, rates()):
                    gamma.copy_(gamma.sign() * (gamma.abs() - 0.1 * rate).clamp(min=0))
                near_zero = torch.cat(gammas).abs() < hook['near_zero_thr']
                schedule.update(near_zero.double().mean().item(), iteration / ITERS)
    return model


@pytest.mark.parametrize('name', HOOKS)
def test_ranks_do_the_formula(ranks, name):
    model = train_by_hand(HOOKS[name])
    for key, value in model.named_parameters():
        torch.testing.assert_close(ranks[0][name]['weights'][key].detach(), value.detach())
