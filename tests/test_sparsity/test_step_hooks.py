# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.optim import ExponentialLR

from mmgcp import compatibility


def native(optimizer, function):
    if not hasattr(optimizer, 'register_step_post_hook'):
        pytest.skip('torch has no step hooks')
    return compatibility.register_step_post_hook(optimizer, function)


@pytest.mark.parametrize('register', [native, compatibility._StepPostHook])
def test_post_hook(register):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    seen = []
    handle = register(optimizer, lambda opt: seen.append((opt is optimizer, weight.item())))
    scheduler = ExponentialLR(optimizer, gamma=1., by_epoch=False)
    weight.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    assert seen == [(True, 0.75)]
    handle.remove()
    optimizer.step()
    assert len(seen) == 1 and weight.item() == 0.5


def test_closure_is_passed_on_and_its_loss_comes_back():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    compatibility._StepPostHook(optimizer, lambda _: None)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1 and weight.item() == 0.75


def test_pre_and_post_hooks_of_torch_1_13_nest():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    weight.grad = torch.ones(1)
    original = optimizer.step
    seen = []
    handles = [
        compatibility._StepPreHook(optimizer, lambda _: seen.append(('pre', weight.item()))),
        compatibility._StepPostHook(optimizer, lambda _: seen.append(('post', weight.item()))),
        compatibility._StepPostHook(optimizer, lambda _: seen.append(('last', weight.item())))]
    optimizer.step()
    assert seen == [('pre', 1.), ('post', 0.75), ('last', 0.75)]
    for handle in reversed(handles):
        handle.remove()
    assert optimizer.step == original
