# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import fnmatch
import functools
from typing import Dict, List, Optional, Sequence, Set, Union

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.utils import is_seq_of
from mmengine.visualization import TensorboardVisBackend
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.compatibility import register_step_pre_hook
from mmgcp.registry import HOOKS, TASK_UTILS


@HOOKS.register_module()
class DynamicSparsityHook(Hook):
    """Press the scale factors of BatchNorm layers to zero while training.

    The loss gets the term ``s * sum(|gamma|)`` of network slimming
    (https://arxiv.org/abs/1708.06519), whose ``s`` may change with the progress of the
    training and differ between channels, as in GCP-SAD (https://arxiv.org/abs/2306.01526).

    The subgradient ``s * sign(gamma)`` is added to ``gamma.grad`` right before the optimizer's
    step: after gradients were unscaled and clipped, once per update if gradients are
    accumulated, and not at all if the gradient scaler skips the step. The hook has no state
    of its own, so a resumed training continues as if it had not been interrupted.

    Beside the loss it logs, every ``log_interval`` iterations and at an epoch's end,
    ``sparsity_rate`` (s, averaged over the channels), ``sparsity_loss`` (the term above) and
    ``sparsity_near_zero`` (the share of channels whose \\|gamma\\| is below ``near_zero_thr``).

    Args:
        rate (float): The sparsity rate s, typically 1e-4 to 1e-3. Defaults to 1e-3.
        schedule (dict, optional): How s develops: ``dict(type='constant')`` or
            ``dict(type='two_phase')``, see :mod:`mmgcp.engine.sparsity_schedules`.
            Defaults to the constant one.
        modules (Sequence[str], optional): Patterns in the manner of fnmatch, such as
            ``'backbone.*'``. Only BatchNorm layers whose name matches one of them take part.
            Defaults to None, which means all.
        exclude (Sequence[str], optional): Patterns of BatchNorm layers that do not take part.
        near_zero_thr (float): Below it a \\|gamma\\| counts as near zero. Defaults to 1e-2.
        log_interval (int): Iterations between two logs. Defaults to 50.
        histogram_interval (int): Epochs between two histograms of gamma, which go to the
            visualizer; 0 for none. Defaults to 1.

    Raises:
        ValueError: If a pattern matches no BatchNorm layer, or if none is left.
    """

    priority = 'NORMAL'

    def __init__(self,
                 rate: float = 1e-3,
                 schedule: Optional[dict] = None,
                 modules: Optional[Sequence[str]] = None,
                 exclude: Optional[Sequence[str]] = None,
                 near_zero_thr: float = 1e-2,
                 log_interval: int = 50,
                 histogram_interval: int = 1) -> None:
        for name, value in dict(rate=rate, near_zero_thr=near_zero_thr,
                                histogram_interval=histogram_interval).items():
            if not value >= 0:
                raise ValueError(f'{name} must not be negative, but got {value}.')
        if log_interval < 1:
            raise ValueError(f'log_interval must be at least 1, but got {log_interval}.')
        for name, value in dict(modules=modules, exclude=exclude).items():
            if value is not None and (isinstance(value, str) or not is_seq_of(value, str)):
                raise TypeError(f'{name} must be a sequence of patterns, but got {value!r}.')
        self.rate = rate
        # Our scope, because a bare type would be looked up in the default scope.
        schedule = schedule or dict(type='constant')
        self.schedule = TASK_UTILS.build(dict(schedule, _scope_='mmgcp'))
        self.modules = modules
        self.exclude = exclude
        self.near_zero_thr = near_zero_thr
        self.log_interval = log_interval
        self.histogram_interval = histogram_interval
        self._gammas: List[nn.Parameter] = []
        self._handles: list = []

    def before_train(self, runner) -> None:
        """Find the scale factors and hook into the optimizers' steps."""
        self._remove_handles()
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._gammas = find_gammas(model, self.modules, self.exclude)
        unowned = {id(gamma) for gamma in self._gammas}
        for optimizer in _optimizers(runner.optim_wrapper):
            parameters = {id(p) for group in optimizer.param_groups for p in group['params']}
            add_penalty = functools.partial(self._add_penalty, runner, unowned & parameters)
            self._handles.append(register_step_pre_hook(optimizer, add_penalty))
            unowned -= parameters

    def after_train(self, runner) -> None:
        """Leave the optimizers as they were."""
        self._remove_handles()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Log, early enough for the LoggerHook to print it."""
        if (self.every_n_inner_iters(batch_idx, self.log_interval)
                or self.end_of_epoch(runner.train_dataloader, batch_idx)):
            self._log_scalars(runner)

    def after_train_epoch(self, runner) -> None:
        """Draw the histogram."""
        if self.histogram_interval and self.every_n_epochs(runner, self.histogram_interval):
            self._log_histogram(runner)

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _trained_gammas(self) -> List[nn.Parameter]:
        # Not once for all: detectors freeze their stages when they enter train mode.
        return [gamma for gamma in self._gammas if gamma.requires_grad]

    def _rates(self, runner, magnitudes: Tensor) -> Union[float, Tensor]:
        return self.schedule.rates(magnitudes, self.rate, runner.iter / runner.max_iters)

    def _add_penalty(self, runner, owned: Set[int], optimizer: torch.optim.Optimizer) -> None:
        gammas = self._trained_gammas()
        if not gammas:
            return
        values = _concatenate(gammas)
        penalty = self._rates(runner, values.abs()) * values.sign()
        # A fused optimizer divides by the scale inside of its step.
        if getattr(optimizer, '_step_supports_amp_scaling', False):
            scale = getattr(optimizer, 'grad_scale', None)
            penalty = penalty if scale is None else penalty * scale
        parts = penalty.split([gamma.numel() for gamma in gammas])
        pairs = [(gamma.grad, part) for gamma, part in zip(gammas, parts)
                 if gamma.grad is not None and id(gamma) in owned]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs)))

    def _log_scalars(self, runner) -> None:
        gammas = self._trained_gammas()
        if not gammas:
            return
        magnitudes = _concatenate(gammas).abs()
        rates = torch.as_tensor(self._rates(runner, magnitudes)).to(magnitudes)
        scalars = dict(
            sparsity_rate=rates.mean(),
            sparsity_loss=(rates * magnitudes).sum(),
            sparsity_near_zero=(magnitudes < self.near_zero_thr).float().mean())
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f'train/{name}', value.item())

    @master_only
    def _log_histogram(self, runner) -> None:
        gammas = self._trained_gammas()
        if not gammas:
            return
        values = _concatenate(gammas).float().cpu().numpy()
        step = runner.epoch + 1
        title = f'epoch {step}, iteration {runner.iter}, rate {self.rate:g}'
        image = draw_gamma_histogram(values, self.near_zero_thr, title)
        # No slash in the name: the local backend would take it for a folder, and fail.
        runner.visualizer.add_image('sparsity_gamma_histogram', image, step=step)
        for backend in runner.visualizer._vis_backends.values():
            if isinstance(backend, TensorboardVisBackend):
                backend.experiment.add_histogram('sparsity/gamma', values, step)


def find_gammas(model: nn.Module,
                modules: Optional[Sequence[str]] = None,
                exclude: Optional[Sequence[str]] = None) -> List[nn.Parameter]:
    """The scale factors of a model's BatchNorm layers, a shared one once.

    Args:
        model (nn.Module): The model.
        modules (Sequence[str], optional): Patterns of the layers' names, None for all.
        exclude (Sequence[str], optional): Patterns of the names of layers to leave out.

    Returns:
        List[nn.Parameter]: The weights, in the model's order.
    """
    layers = {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.affine
    }
    included = _match(layers, ['*'] if modules is None else modules)
    excluded = {id(layers[name]) for name in _match(layers, exclude or [])}
    gammas = {id(layers[name]): layers[name] for name in layers if name in included}
    chosen = [gamma for key, gamma in gammas.items() if key not in excluded]
    if not chosen:
        raise ValueError(f'No BatchNorm layer is left by modules={modules}, exclude={exclude}.')
    return chosen


def _match(layers: Dict[str, nn.Parameter], patterns: Sequence[str]) -> Set[str]:
    matched: Set[str] = set()
    for pattern in patterns:
        names = fnmatch.filter(layers, pattern)
        if not names:
            raise ValueError(f'The pattern {pattern!r} matches no affine BatchNorm layer.')
        matched.update(names)
    return matched


def _optimizers(optim_wrapper) -> List[torch.optim.Optimizer]:
    if isinstance(optim_wrapper, OptimWrapperDict):
        return [wrapper.optimizer for wrapper in optim_wrapper.values()]
    return [optim_wrapper.optimizer]


def _concatenate(gammas: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([gamma.detach() for gamma in gammas])


def draw_gamma_histogram(values: np.ndarray, near_zero_thr: float, title: str) -> np.ndarray:
    """Draw the distribution of scale factors, counts on a logarithmic axis.

    Args:
        values (np.ndarray): The scale factors, of shape (n, ).
        near_zero_thr (float): Marked on both sides of zero.
        title (str): The first line of the title.

    Returns:
        np.ndarray: RGB image of shape (480, 640, 3), uint8.
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(values, bins=100, log=True)
    for threshold in (-near_zero_thr, near_zero_thr):
        axes.axvline(threshold, color='tab:red', linestyle='--', linewidth=0.8)
    share = np.mean(np.abs(values) < near_zero_thr)
    axes.set_title(f'{title}\n{share:.1%} of {values.size} channels below {near_zero_thr:g}')
    axes.set_xlabel('BatchNorm scale factor')
    axes.set_ylabel('channels')
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()
