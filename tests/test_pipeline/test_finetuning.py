# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Fine-tuning between two channel units, on a small data set."""
import random

import numpy as np
import pytest
import torch
from mmengine.dist import get_rank
from mmyolo.utils import register_all_modules
from ranks import on_ranks

from mmgcp.errors import PruningError
from mmgcp.pipeline.finetuning import IntermediateFinetuning
from mmgcp.utils.config import build_detector, load_config

HOOKS = """
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.5, update_buffers=True),
    dict(type='mmgcp.DynamicSparsityHook', rate=1000.)
]
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_config):
    """A folder with the config of a tiny detector, with hooks that are of no use between units."""
    path = write_config(tmp_path_factory.mktemp('finetuning') / 'tiny.py')
    path.write_text(path.read_text() + HOOKS)
    return path.parent


@pytest.fixture(scope='module')
def cfg(folder):
    return load_config(str(folder / 'tiny.py'))


def test_training_leaves_removed_channels_off(cfg, tmp_path):
    """And the rate, the seed and the skipped hooks are as said; random numbers go on."""
    torch.manual_seed(0)
    model = build_detector(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    conv, seen, steps = model.backbone.stem.conv, [], []
    handles = [
        conv.register_forward_hook(lambda _, __, output: output.index_fill(
            1, torch.tensor([0, 2]), 0.)),
        model.backbone.stem.bn.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach().abs().sum((0, 2, 3)) > 0))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = IntermediateFinetuning(cfg, epochs=2, every=3,
                                      progress=lambda *step: steps.append(step))
    assert training.settings == dict(epochs=2, lr=pytest.approx(0.1 * cfg.base_lr), every=3)
    training(model, 4)
    assert seen == [] and steps == []

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    training(model, 6)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert steps[-1] == ('fine-tuning', len(steps), len(steps)) and len(seen) == len(steps) > 1
    assert all((~mask).nonzero().flatten().tolist() == [0, 2] for mask in seen)
    after = model.state_dict()
    assert not torch.equal(after['backbone.stem.conv.weight'], before['backbone.stem.conv.weight'])
    # with the sparsity hook it would be tens
    assert (after['backbone.stem.bn.weight'] - before['backbone.stem.bn.weight']).abs().max() < 1
    hooks = {type(hook).__name__ for hook in training._make_runner(model, 6, tmp_path).hooks}
    assert 'RuntimeInfoHook' in hooks and not hooks & {
        'EMAHook', 'DynamicSparsityHook', 'CheckpointHook', 'YOLOv5ParamSchedulerHook'}

    for handle in handles:
        handle.remove()
    results = []
    for _ in range(2):  # the same for the same number, another for another
        model.load_state_dict(before)
        training(model, 6)
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    model.load_state_dict(before)
    training(model, 9)
    assert not torch.equal(model.state_dict()['backbone.stem.conv.weight'],
                           results[0]['backbone.stem.conv.weight'])


def test_settings_of_the_class(cfg):
    with pytest.raises(PruningError, match='lr of the fine-tuning must be .* but is -1'):
        IntermediateFinetuning(cfg, lr=-1.)
    with pytest.raises(PruningError, match='every of the fine-tuning must be .* but is 0'):
        IntermediateFinetuning(cfg, every=0)


def trained(folder):
    """The state of a detector before and after training in one of several processes."""
    register_all_modules()
    torch.manual_seed(0)
    cfg = load_config(str(folder / 'tiny.py'))
    model = build_detector(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(get_rank())
    IntermediateFinetuning(cfg)(model, 1)
    return before, model.state_dict()


@pytest.mark.slow
def test_several_processes(folder):
    """All have the weights of the mean gradient, and the mean of their statistics."""
    (before, first), (_, second) = on_ranks(__file__, 'trained', folder)
    assert first.keys() == before.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name in ('backbone.stem.conv.weight', 'backbone.stem.bn.running_mean'):
        assert not torch.equal(first[name], before[name])
