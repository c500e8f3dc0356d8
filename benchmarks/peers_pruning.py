# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning a detector to a budget of MACs or parameters, by this project and by its peers."""
import copy
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence
from unittest import mock

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.analysis import count_complexity
from mmgcp.attention import attention_aside, plain_config
from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import UserError
from mmgcp.nn.forward import random_image, run_as_tensors, working_shape
from mmgcp.nn.temporarily import modes
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode
from mmgcp.pruning import prune
from mmgcp.pruning.dependencies import ChannelGraph
from mmgcp.pruning.detector import make_pruned_config, registered_name
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import build_detector
from mmgcp.utils.detectors import load_detector
from mmgcp.utils.devices import find_device

STEPS = 12  # of bisection: the pruning ratio is exact to a 4096th
# How many channels MMRazor's Group Fisher prunes, one by one, between two counts of the MACs
CHANNELS_BETWEEN_COUNTS = 4
# Shares of what can be removed: the option of prune(), and the place in what is counted
AMOUNTS = dict(parameters=('target_params', 0), MACs=('target_flops', 1))


@dataclass
class Task:
    """What to prune.

    Attributes:
        model (nn.Module): The detector, which may be changed.
        cfg (Config): Its config.
        share (float): The share to remove, of what ``of`` says.
        shape (Sequence[int]): Shape (C, H, W) of the image that MACs are counted for, in pixels.
        batches (Sequence[Batch]): Training data to calibrate with.
        options (dict): Of the pruner.
        seed (int, optional): Of a criterion with chance in it.
        finetune (Callable, optional): Trains the detector between steps.
        of (str): What the share is of; a key of :data:`AMOUNTS`.
    """
    model: nn.Module
    cfg: Config
    share: float
    shape: Sequence[int]
    batches: Sequence[Batch]
    options: Dict[str, Any]
    seed: Optional[int] = None
    finetune: Optional[Callable[[nn.Module, int], Any]] = None
    of: str = 'MACs'

    def amount(self, model: nn.Module) -> int:
        """How many MACs, or parameters, a detector has."""
        return count_complexity(model, self.shape)[AMOUNTS[self.of][1]]

    def budget(self) -> float:
        """How many of them may be left."""
        return (1 - self.share) * self.amount(self.model)


@dataclass
class Pruned:
    """A pruned detector; its config only if this project has pruned it."""
    model: nn.Module
    cfg: Optional[Config] = None


def keep(task: Task) -> Pruned:
    """Prune nothing."""
    return Pruned(task.model, task.cfg)


def prune_with_mmgcp(task: Task) -> Pruned:
    """Prune with :func:`mmgcp.pruning.prune`."""
    detector = registered_name(type(task.model))
    options = dict(task.options)
    if task.seed is not None:
        options['criterion'] = dict(options['criterion'], seed=task.seed)
    with attention_aside(task.model):
        result = prune(task.model, input_shape=task.shape, batches=task.batches,
                       calibration=ImagesOf(task.batches), finetune=task.finetune,
                       **{AMOUNTS[task.of][0]: 1 - task.share}, **options)
    cfg = make_pruned_config(plain_config(task.cfg), detector, result.changed_channels)
    return Pruned(result.model, cfg)


def save_pruned(pruned: Pruned, path: Path) -> None:
    """Write what this project has pruned to PATH.pth, and its config to PATH.py."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path.with_suffix('.py'), path) as (config, file):
        pruned.cfg.dump(config)
        torch.save(dict(state_dict=pruned.model.state_dict()), file)


def load_pruned(path: Path) -> Pruned:
    """Load what :func:`save_pruned` has written, to where MMEngine trains."""
    loaded = load_detector(str(path.with_suffix('.py')), str(path))
    return Pruned(loaded.model.to(find_device()), loaded.cfg)


def prune_with_torch_pruning(task: Task) -> Pruned:
    """Prune with Torch-Pruning's BasePruner at the ratio that meets the budget.

    Options: ``importance``, the name of its class; ``global_pruning``; and ``recalibrate``,
    whether to estimate the statistics of BatchNorm anew afterwards.
    """
    torch_pruning = importlib.import_module('torch_pruning')
    importance = getattr(torch_pruning.importance, task.options['importance'])
    shape = working_shape(task.model, task.shape)
    ignored = ChannelGraph(task.model, shape).prediction_layers()
    task.model.requires_grad_(True)
    gradients = {}
    if 'Taylor' in task.options['importance']:
        gradients = loss_gradients(task.model, task.batches)

    def prune_at(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.model)
        for name, param in model.named_parameters():
            param.grad = gradients.get(name)
        pruner = torch_pruning.pruner.BasePruner(
            model, random_image(model, shape), importance=importance(), pruning_ratio=ratio,
            global_pruning=task.options['global_pruning'], forward_fn=run_as_tensors,
            ignored_layers=[model.get_submodule(name) for name in ignored],
            in_channel_groups={}, out_channel_groups={})  # its defaults are shared and changed
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model

    model = meet_budget(prune_at, task)
    if task.options['recalibrate']:
        recalibrate(model, ImagesOf(task.batches))
    return Pruned(model)


def loss_gradients(model: nn.Module, batches: Sequence[Batch]) -> Dict[str, torch.Tensor]:
    """Sum the gradients of the losses of batches, by name of the parameter."""
    model.zero_grad(set_to_none=True)
    with loss_mode(model):
        for batch in batches:
            detection_loss(model, batch).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()
                 if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


@torch.no_grad()
def recalibrate(model: nn.Module, images: ImagesOf) -> None:
    """Estimate the statistics of all BatchNorms anew: their means over all batches."""
    momenta = {module: module.momentum for module in model.modules()
               if isinstance(module, _BatchNorm)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # which stands for the mean
    with modes(model, lambda module: module in momenta):
        for batch in images:
            run_as_tensors(model, batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


def meet_budget(prune_at: Callable[[float], nn.Module], task: Task) -> nn.Module:
    """Prune at the ratio with which the MACs come closest to the budget, on either side.

    Where each layer loses the same ratio, many of them lose their next channel at once, and the
    MACs jump, as do the parameters.

    Args:
        prune_at (Callable): Returns a detector pruned at a ratio, and leaves the original alone.
        task (Task): Has the budget.

    Raises:
        UserError: There is no such ratio.
    """
    budget = task.budget()
    low, high, found, least = 0., 1., None, math.inf
    for _ in range(STEPS):
        ratio = (low + high) / 2
        model = prune_at(ratio)
        excess = task.amount(model) - budget
        if abs(excess) < least:
            found, least = model, abs(excess)
        low, high = (ratio, high) if excess > 0 else (low, ratio)
    if high == 1:
        raise UserError(f'no pruning ratio removes {task.share:.0%} of the {task.of}')
    return found


# ---------------------------------------------------------------- MMRazor
def import_mmrazor() -> None:
    """Import MMRazor 1.0.0 so that its pruning works.

    Its quantization uses functions that newer versions of torch lack, and is left out for torch
    before 1.13: with a newer one that lacks them, MMRazor is told that it is an old one. MMRazor
    also needs cloudpickle, joblib, ordered-set, pydacefit, scikit-learn, scipy and timm. As its
    metadata ask for numpy<1.24, install all of them with ``pip install --no-deps --target FOLDER``,
    and put the folder on the PYTHONPATH.
    """
    mappings = importlib.import_module('torch.ao.quantization.fuser_method_mappings')
    version = torch.__version__ if hasattr(mappings, 'reverse2') else '1.12.0'
    with mock.patch.object(torch, '__version__', version):
        importlib.import_module('mmrazor.models')


def make_mutator(model: nn.Module, mutator: type, unit: str, shape: Sequence[int]) -> Any:
    """Put MMRazor's masks into a detector, in place, and return what sets them."""
    demo = dict(type='DefaultDemoInput', input_shape=[1, *shape])
    mutator = mutator(
        channel_unit_cfg=dict(type=unit), parse_cfg=dict(
            type='ChannelAnalyzer', demo_input=demo, tracer_type='FxTracer'))
    weights = copy.deepcopy(model.state_dict())
    with DefaultScope.overwrite_default_scope('mmrazor'):  # which it builds its parts in
        mutator.prepare_from_supernet(model)
    model.load_state_dict(weights, strict=False)  # its layers are new, with random weights
    return mutator


def export(model: nn.Module) -> nn.Module:
    """Return an ordinary detector without the channels that MMRazor has masked."""
    structures = importlib.import_module('mmrazor.structures')
    return structures.export_fix_subnet(model, slice_weight=True)[1]


def prune_with_mmrazor_l1(task: Task) -> Pruned:
    """Prune with MMRazor's L1 norm: the same share of each of its units."""
    import_mmrazor()
    mutators = importlib.import_module('mmrazor.models.mutators')

    def prune_at(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.model)
        mutator = make_mutator(model, mutators.ChannelMutator, 'L1MutableChannelUnit', task.shape)
        mutator.set_choices({unit.name: max(1, round((1 - ratio) * unit.num_channels))
                             for unit in mutator.mutable_units})
        return export(model)

    return Pruned(meet_budget(prune_at, task))


def prune_with_mmrazor_group_fisher(task: Task) -> Pruned:
    """Prune with MMRazor's Group Fisher, one channel after each batch of the calibration data.

    In its paper weights are trained meanwhile; here they are not, as in all that is compared.
    """
    import_mmrazor()
    fisher = importlib.import_module('mmrazor.implementations.pruning.group_fisher')
    model, budget = task.model, task.budget()
    mutator = make_mutator(
        model, fisher.GroupFisherChannelMutator, 'GroupFisherChannelUnit', task.shape)
    silent = mock.patch('mmrazor.implementations.pruning.group_fisher.mutator.print_log')
    with loss_mode(model), silent:
        for number in range(sum(unit.num_channels for unit in mutator.mutable_units)):
            _prune_channel(model, mutator, task.batches[number % len(task.batches)])
            if number % CHANNELS_BETWEEN_COUNTS == 0:
                pruned = export(model)
                if task.amount(pruned) <= budget:
                    return Pruned(pruned.eval())
    raise UserError(f'MMRazor cannot remove {task.share:.0%} of the {task.of}')


def _prune_channel(model: nn.Module, mutator: Any, batch: Batch) -> None:
    """Mask the channel with the smallest Fisher information in a batch."""
    mutator.start_record_info()
    detection_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    mutator.end_record_info()
    mutator.update_imp()
    mutator.reset_recorded_info()
    mutator.try_prune()
    mutator.reset_imp()


# ---------------------------------------------------------------- distilling
def make_distiller(pruned: Pruned, teacher: Path, checkpoint: str) -> nn.Module:
    """Return a SpatialAttentionDistiller with a copy of a detector that mmgcp has pruned.

    Args:
        pruned (Pruned): The student.
        teacher (Path): Config of the teacher.
        checkpoint (str): Its weights.
    """
    cfg = copy.deepcopy(pruned.cfg)
    cfg.model = dict(type='mmgcp.SpatialAttentionDistiller', student=cfg.model,
                     teacher=dict(config=str(teacher), checkpoint=checkpoint))
    distiller = build_detector(cfg)
    distiller.load_state_dict(pruned.model.state_dict())
    return distiller


PRUNERS: Dict[str, Callable[[Task], Pruned]] = dict(
    none=keep, mmgcp=prune_with_mmgcp, torch_pruning=prune_with_torch_pruning,
    mmrazor_l1=prune_with_mmrazor_l1, mmrazor_group_fisher=prune_with_mmrazor_group_fisher)
