# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Rehearsals of trainings, of pruning and of all stages."""
import copy
import logging
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from pruning_samples import randomise

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import PruningError, UserError
from mmgcp.pipeline.dry_run import rehearse_stages
from mmgcp.pipeline.rehearsal import rehearse_training
from mmgcp.pipeline.stage_configs import distill_config, sparse_config, sparsity_hook
from mmgcp.pipeline.tool_runner import ToolRunner
from mmgcp.pruning import rehearse_pruning
from mmgcp.utils.checkpoint import describe_misfit
from mmgcp.utils.config import build_detector, load_config

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture(scope='module')
def path(write_config, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('config') / 'tiny.py')


@pytest.fixture
def cfg(path):
    return load_config(str(path))


def test_nothing_is_left(cfg, tmp_path, monkeypatch, capfd):
    """Neither files, nor output, nor a change of the config or of random states."""
    monkeypatch.chdir(tmp_path)
    mend_openmmlab()  # which logs what it does
    capfd.readouterr()
    before, states = copy.deepcopy(cfg.to_dict()), (random.getstate(), torch.get_rng_state())
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='mmgcp.DynamicSparsityHook')]
    model = rehearse_training(cfg)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ('', '')
    cfg.custom_hooks = cfg.custom_hooks[:-1]
    assert cfg.to_dict() == before
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert model.state_dict().keys() == build_detector(cfg).state_dict().keys()
    assert MessageHub.get_current_instance().get_info('epoch', 0) in (0, None)


@pytest.mark.parametrize('options, message', [
    (dict(custom_hooks=[dict(type='mmgcp.DynamicSparsityHook', modules=['nek.*'])]),
     "pattern 'nek.*' matches no affine BatchNorm"),
    (dict(custom_hooks=[dict(type='mmgcp.DynamicSparsityHook', rate='x')]), "rate .* 'x'"),
    (dict(custom_hooks=[dict(type='mmgcp.DistillAdapterHook')]),
     'DistillAdapterHook needs a model of the type mmgcp.SpatialAttentionDistiller'),
    (dict(custom_hooks=[dict(type='Hok')]), r'custom_hooks \(Hok\) of the config cannot be built'),
    ({'train_dataloader.dataset.data_root': 'nowhere'}, "train_dataloader .* 'nowhere"),
    ({'train_dataloader.dataset.pipeline': [dict(type='Lod')]}, 'train_dataloader .* Lod'),
    ({'val_dataloader.batch_size': 'x'}, 'val_dataloader'),
    ({'optim_wrapper.optimizer.lr': -1},
     'optim_wrapper.optimizer.lr of the config must be .* but is -1'),
    (dict(load_from='nowhere.pth'), 'there is no checkpoint nowhere.pth'),
    ({'model.bbox_head.head_module.num_classes': 1},
     'the training data has [0-9]+ classes .* the detector of the config has 1 '),
    (dict(train_cfg=None), 'train_cfg of the config must be a dict, but is None'),
])
def test_mistakes(cfg, options, message):
    cfg.merge_from_dict(options)
    with pytest.raises(UserError, match=message) as caught:
        rehearse_training(cfg)
    assert '\n' not in str(caught.value)


def test_checkpoint_to_start_from(cfg, tmp_path):
    """One of other classes is described, one of another architecture is an error."""
    model = build_detector(cfg)
    cfg.model.bbox_head.head_module.num_classes += 1
    other = build_detector(cfg)
    text = describe_misfit(other, dict(state_dict=model.state_dict()), 'a.pth')
    number = len(model.state_dict())
    assert f'a.pth does not fit the model of the config: training starts from {number - 6} of ' in (
        text)
    assert '6 mismatched (bbox_head.head_module.convs_pred.0.weight' in text
    assert describe_misfit(model, dict(model.state_dict()), 'a.pth') == ''  # a bare state dict
    torch.save(dict(state_dict={'fc.weight': torch.ones(1)}), tmp_path / 'a.pth')
    cfg.load_from = str(tmp_path / 'a.pth')
    with pytest.raises(UserError, match=f'none of the weights of {cfg.load_from} fits the model'):
        rehearse_training(cfg, with_data=False)
    cfg.resume = True  # what is resumed from need not be there yet
    rehearse_training(cfg, with_data=False)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize('options, message', [
    (dict(target_params=0.001, min_keep_ratio=0.5), '0.1% of the parameters cannot be reached'),
    (dict(target_params=0.5, target_flops=1e-9), '1e-07% of the MACs cannot be reached'),
    (dict(groups=[dict(name='a', modules=['nek'])], ratio=0.5), "pattern 'nek'"),
    (dict(ratio=0.5, criterion=dict(type='mmgcp.OBS', rigde=1)), "'rigde'"),
    (dict(), 'neither a ratio nor a threshold'),
])
def test_pruning_that_cannot_be_done(cfg, options, message):
    model = randomise(build_detector(cfg))
    before = state_of(model)
    with pytest.raises(PruningError, match=message):
        rehearse_pruning(model, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('criterion', ['BNScale', 'Taylor', 'LCP', 'L1Norm'])
def test_pruning_that_can_be_done(cfg, criterion):
    """On untrained weights and without data, whatever the criterion needs; nothing changes."""
    model = build_detector(cfg)
    before = state_of(model)
    rehearse_pruning(model, criterion=dict(type=f'mmgcp.{criterion}'), target_params=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def rehearse(path, folder, checkpoint=None, arguments=('--target-params', '0.5'), hook=None,
             groups='auto', sparse=True):
    """Rehearse all stages as compress() does."""
    cfg = Config.fromfile(str(path))
    hook = sparsity_hook(cfg, schedule='two_phase') if hook is None else hook
    rehearse_stages(ToolRunner(TOOLS, folder), path, checkpoint, arguments,
                    sparse and (lambda cfg, trained: sparse_config(cfg, trained, 1, hook)),
                    lambda cfg, trained: distill_config(cfg, str(path), trained, 1, groups))


@pytest.mark.parametrize('settings, message', [
    (dict(hook=dict(type='mmgcp.DynamicSparsityHook', schedule=dict(type='foo'))),
     "the stage sparse would fail: .*no sparsity schedule 'foo'"),
    (dict(arguments=['--target-params', '0.000001']),
     'the stage prune would fail: 0.0001% of the parameters cannot be reached'),
    (dict(arguments=['--plan', 'absent.json']), 'the stage prune would fail: .*absent.json'),
    (dict(groups=[dict(name='a', weight=1., layers=['backbone.stag1'])]),
     "the stage distilled would fail: .*'backbone.stag1'"),
])
def test_stages(path, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        rehearse(path, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_all_stages_can_be_done(path, tmp_path):
    """Also from a checkpoint that is a bare state dict."""
    torch.save(build_detector(Config.fromfile(str(path))).state_dict(), tmp_path / 'bare.pth')
    for sparse in (True, None):
        rehearse(path, tmp_path / 'out', checkpoint=str(tmp_path / 'bare.pth'), sparse=sparse)
    rehearse(path, tmp_path / 'out', sparse=None)
    assert [item.name for item in tmp_path.iterdir()] == ['bare.pth']


@pytest.mark.parametrize('options', [{}, {'val_dataloader.batch_size': 'x'},
                                     {'default_hooks.logger.type': 'Non'}])
def test_no_log_file_is_left_open(cfg, options):
    """Whatever goes wrong; models that are built later write to the current logger's files."""
    def present():
        return [handler for logger in MMLogger._instance_dict.values()
                for handler in logger.handlers]

    cfg.merge_from_dict(options)
    before = present()
    with pytest.raises(UserError) if options else nullcontext():
        rehearse_training(cfg)
    handlers = [handler for handler in present() if handler not in before]
    assert all(handler.stream is not None for handler in handlers)
    assert all(Path(handler.baseFilename).exists() for handler in handlers
               if isinstance(handler, logging.FileHandler))
