# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.optim import ExponentialLR, LinearLR

from mmgcp.compatibility import register_step_post_hook, register_step_pre_hook
from mmgcp.compatibility.step_hooks import StepPostHook, StepPreHook


def native_post(optimizer, function):
    if not hasattr(optimizer, 'register_step_post_hook'):
        pytest.skip('torch has no step hooks')
    return register_step_post_hook(optimizer, function)


@pytest.mark.parametrize('register', [native_post, StepPostHook])
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
    StepPostHook(optimizer, lambda _: None)

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
        StepPreHook(optimizer, lambda _: seen.append(('pre', weight.item()))),
        StepPostHook(optimizer, lambda _: seen.append(('post', weight.item()))),
        StepPostHook(optimizer, lambda _: seen.append(('last', weight.item())))]
    optimizer.step()
    assert seen == [('pre', 1.), ('post', 0.75), ('last', 0.75)]
    for handle in reversed(handles):
        handle.remove()
    assert optimizer.step == original


def native_pre(optimizer, function):
    if not hasattr(optimizer, 'register_step_pre_hook'):
        pytest.skip('torch has no step hooks')
    return register_step_pre_hook(optimizer, function)


@pytest.mark.parametrize('register', [native_pre, StepPreHook])
@pytest.mark.parametrize('with_scheduler', [False, True])
def test_step_pre_hook(register, with_scheduler):
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if with_scheduler:
        scheduler = LinearLR(optimizer, start_factor=1.0)

    def one_step():
        weight.grad = torch.tensor([0.25])
        optimizer.step()
        if with_scheduler:
            scheduler.step()
        return weight.item()

    handle = register(optimizer, lambda opt: opt.param_groups[0]['params'][0].grad.add_(0.5))
    assert one_step() == 1.0 - 0.75
    handle.remove()
    assert one_step() == 0.25 - 0.25


def test_silenced_when_wrapped_again():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    calls = []
    first = StepPreHook(optimizer, lambda _: calls.append(1))
    second = StepPreHook(optimizer, lambda _: calls.append(2))
    first.remove()
    optimizer.step()
    second.remove()
    optimizer.step()
    assert calls == [2]
