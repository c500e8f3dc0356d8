# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import functools
from typing import Any, List, Optional, Sequence, Set, Union

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from mmgcp.compatibility import register_step_post_hook, register_step_pre_hook
from mmgcp.errors import UserError
from mmgcp.nn.forward import IMAGE_SHAPE
from mmgcp.registry import HOOKS
from mmgcp.utils.checks import (
    BOOLEAN,
    CONFIG,
    COUNT,
    COUNT_OR_NONE,
    INPUT_SHAPE,
    NOT_NEGATIVE,
    checked,
    number_in,
    one_of,
)

from .channels import Channels, ScaleFactors
from .divergence import FiniteWatch
from .logs import show_histograms, summarize
from .penalties import add_subgradient, has_skipped, shrink
from .schedules import build_schedule
from .selection import check_selection, select_scale_factors
from .weight_decay import describe_weight_decay, remove_weight_decay

PENALTIES = ('subgradient', 'proximal')
WEIGHT_DECAYS = ('remove', 'keep')
RATE = number_in(0, 1e6)
STATE = 'sparsity_schedule'  # key of the schedule's state in checkpoints


@HOOKS.register_module()
class DynamicSparsityHook(Hook):
    """Shrink the scale factors of BatchNorm layers towards zero during training.

    The loss gets the term ``s * sum(|gamma|)`` of network slimming
    (https://arxiv.org/abs/1708.06519). Its rate ``s`` may change in the course of the
    training and differ between channels, as in GCP-SAD (https://arxiv.org/abs/2306.01526).

    The penalty is applied when the optimizer makes a step: after gradients were unscaled and
    clipped, once per update if gradients are accumulated, and not at all if the gradient
    scaler skips the step. It depends only on the scale factors, on the progress of the
    training and on the schedule's state, which checkpoints contain. So all ranks do the same,
    and a resumed training continues as if it had not been interrupted.

    Next to the loss it logs, every ``log_interval`` iterations and at the end of an epoch,
    ``sparsity_rate`` (s, averaged over the channels), ``sparsity_loss`` (the term above),
    ``sparsity_near_zero`` (the share of channels whose |gamma| is below ``near_zero_thr``)
    and, if there are groups, ``sparsity_near_zero/GROUP``. ``tools/analysis_tools/
    plot_sparsity.py`` draws them.

    Args:
        rate (float): The sparsity rate s, typically 1e-4 to 1e-3. Defaults to 1e-3.
        schedule (dict, optional): How s changes: ``dict(type='constant')``, ``'two_phase'``,
            ``'linear'``, ``'cosine'``, ``'step'`` or ``'feedback'``, see
            :mod:`mmgcp.sparsity.schedules`. Defaults to the constant one.
        modules (str | Sequence[str], optional): fnmatch patterns such as ``'backbone.*'``:
            only BatchNorm layers whose names match one of them are penalised.
            ``'prunable'`` stands for the channels that pruning could remove from this model,
            which are found by Torch-Pruning. Defaults to None, which means all.
        exclude (Sequence[str], optional): Patterns of BatchNorm layers to leave out.
        near_zero_thr (float): A |gamma| below it counts as near zero. Defaults to 1e-2.
        log_interval (int): Iterations between two logs. Defaults to 50.
        histogram_interval (int): Epochs between two histograms of gamma, which are passed to
            the visualizer; 0 for none. Defaults to 1.
        penalty (str): ``'subgradient'`` adds ``s * sign(gamma)`` to the gradient before the
            optimizer's step. ``'proximal'`` sets gamma to ``sign(gamma) * max(|gamma| - lr * s,
            0)`` after it, with the learning rate of gamma's parameter group at that step
            (ISTA, https://epubs.siam.org/doi/10.1137/080716542, equation 1.5), which gives
            exact zeros. Defaults to 'subgradient'.
        coupled (bool): Penalise channels that can only be removed together, for example
            because of a shortcut, as one: the term is ``s * sqrt(L) * ||(gamma_1, ...,
            gamma_L)||`` over the L layers that have the channel (group lasso,
            https://doi.org/10.1111/j.1467-9868.2005.00532.x, equation 2.1), which is
            ``s * |gamma|`` for a channel of one layer. The schedule sees the root mean square
            of the gammas as magnitude. Needs Torch-Pruning. Defaults to False.
        groups (str | Sequence[dict], optional): Layer groups for the logs, each with a factor
            on s: ``dict(name=..., modules=[patterns], rate_factor=1.)``. A pattern stands for
            the modules that it matches and all modules inside them. Layers of no group have
            the factor 1 and are logged as ``other``. ``'auto'`` takes the groups of
            :func:`mmgcp.pruning.auto_groups`, with the factor 1. A coupled channel has the
            mean factor of its layers. Defaults to None.
        weight_decay (str): What to do with the optimizer's weight decay, which shrinks the
            scale factors, too: ``'remove'`` it for those that are penalised, so that only the
            penalty acts on them, or ``'keep'`` it. A line in the log says how many are
            affected. Weight decay can only be removed from torch's own optimizers.
            Defaults to 'remove'.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of an image to run the model
            on, for 'prunable', ``coupled`` and 'auto'. Defaults to (3, 640, 640).

    Raises:
        UserError: A setting is wrong; at the start of the training, if a pattern matches no
            BatchNorm layer, none is left, a layer is in two groups, or the model cannot be
            traced; during it, at the next log or checkpoint, if scale factors are not finite.
    """

    priority = 'NORMAL'

    @checked(rate=RATE, schedule=CONFIG, near_zero_thr=NOT_NEGATIVE, log_interval=COUNT,
             histogram_interval=COUNT_OR_NONE, penalty=one_of(*PENALTIES), coupled=BOOLEAN,
             weight_decay=one_of(*WEIGHT_DECAYS), input_shape=INPUT_SHAPE)
    def __init__(self,
                 rate: float = 1e-3,
                 schedule: Optional[dict] = None,
                 modules: Union[str, Sequence[str], None] = None,
                 exclude: Optional[Sequence[str]] = None,
                 near_zero_thr: float = 1e-2,
                 log_interval: int = 50,
                 histogram_interval: int = 1,
                 penalty: str = 'subgradient',
                 coupled: bool = False,
                 groups: Union[str, Sequence[dict], None] = None,
                 weight_decay: str = 'remove',
                 input_shape: Sequence[int] = IMAGE_SHAPE) -> None:
        check_selection(modules, exclude, groups)
        self.rate = rate
        self.schedule = build_schedule(schedule or dict(type='constant'))
        self.near_zero_thr = near_zero_thr
        self.log_interval = log_interval
        self.histogram_interval = histogram_interval
        self.penalty = penalty
        self.coupled = coupled
        self.groups = groups
        self.weight_decay = weight_decay
        self._selection = dict(modules=modules, exclude=exclude, coupled=coupled, groups=groups,
                               input_shape=input_shape)
        self._scale_factors: Optional[ScaleFactors] = None
        self._watch: Optional[FiniteWatch] = None
        self._loaded_state: Optional[dict] = None
        self._has_seen_training = False
        self._handles: list = []

    def before_train(self, runner: Runner) -> None:
        """Find the scale factors and hook into the optimizers' steps."""
        self._remove_handles()
        self._has_seen_training = False
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._scale_factors = select_scale_factors(model, **self._selection)
        self._watch = FiniteWatch(self._scale_factors.layers)
        self._resume_schedule(runner)
        optimizers = _optimizers(runner.optim_wrapper)
        gammas = self._scale_factors.gammas
        remove = self.weight_decay == 'remove'
        runner.logger.info(describe_weight_decay(optimizers, gammas, remove))
        chosen = {id(gamma) for gamma in gammas}
        unowned = set(chosen)
        for optimizer in optimizers:
            parameters = {id(p) for group in optimizer.param_groups for p in group['params']}
            if remove and chosen & parameters:
                self._handles += remove_weight_decay(optimizer, chosen)
            # A scale factor of several optimizers is penalised by the first of them.
            self._register_penalty(runner, optimizer, unowned & parameters,
                                   is_first=unowned == chosen)
            unowned -= parameters

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizers as they were."""
        self._remove_handles()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Log, early enough for the LoggerHook to print it, unless the training has diverged.

        The first time, see whether anything is trained.
        """
        if not self._has_seen_training:
            self._has_seen_training = True
            self._check_trained()
        self._watch.look(runner.iter + 1)
        if (self.every_n_inner_iters(batch_idx, self.log_interval)
                or self.end_of_epoch(runner.train_dataloader, batch_idx)):
            self._watch.check()
            self._log_scalars(runner)

    def _check_trained(self) -> None:
        """Raise a UserError if no scale factor is trained, now that detectors have frozen some."""
        if self._scale_factors.trained() is None:
            number = len(self._scale_factors.layers)
            raise UserError(f'sparse training would change nothing: all {number} BatchNorm layers '
                            'that were chosen are frozen (norm_cfg with requires_grad=False, '
                            'frozen_stages, or bn_freeze); train them, or choose others '
                            '(modules)')

    def after_train_epoch(self, runner: Runner) -> None:
        """Draw the histogram."""
        if self.histogram_interval and self.every_n_epochs(runner, self.histogram_interval):
            self._log_histogram(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the schedule's state, if it has any; of a diverged training nothing is saved."""
        if self._watch is not None:
            self._watch.check()
        if hasattr(self.schedule, 'state_dict'):
            checkpoint[STATE] = dict(
                type=type(self.schedule).__name__, state=self.schedule.state_dict())

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the schedule's state until it is known whether the training is resumed."""
        self._loaded_state = checkpoint.get(STATE)

    def _resume_schedule(self, runner) -> None:
        # At iteration 0, the checkpoint was only loaded for its weights.
        if not hasattr(self.schedule, 'load_state_dict') or runner.iter == 0:
            return
        loaded, kind = self._loaded_state, type(self.schedule).__name__
        if loaded is not None and loaded['type'] == kind:
            self.schedule.load_state_dict(loaded['state'])
        else:
            runner.logger.warning(f'Sparsity: the checkpoint has no state of a {kind}, '
                                  'which starts from the beginning.')

    def _register_penalty(self, runner, optimizer: torch.optim.Optimizer, owned: Set[int],
                          is_first: bool) -> None:
        """Apply the penalty of the scale factors ``owned`` at each step of an optimizer."""
        if self.penalty == 'proximal':
            apply, register = self._shrink, register_step_post_hook
        else:
            apply, register = self._add_subgradient, register_step_pre_hook
        self._handles.append(register(optimizer, functools.partial(apply, runner, owned)))
        # Once per update, even if several optimizers share the scale factors
        if owned and is_first and hasattr(self.schedule, 'update'):
            update = functools.partial(self._update_schedule, runner)
            self._handles.append(register_step_post_hook(optimizer, update))

    def _remove_handles(self) -> None:
        # In reverse order, because with torch 1.13 each wraps the ones before it
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []

    def _add_subgradient(self, runner, owned: Set[int],
                         optimizer: torch.optim.Optimizer) -> None:
        channels = self._scale_factors.trained()
        if channels is not None:
            add_subgradient(channels, self._rates(runner, channels), owned, optimizer)

    def _shrink(self, runner, owned: Set[int], optimizer: torch.optim.Optimizer) -> None:
        channels = self._scale_factors.trained()
        if channels is not None and not has_skipped(optimizer):
            shrink(channels, self._rates(runner, channels), owned, optimizer)

    def _update_schedule(self, runner, optimizer: torch.optim.Optimizer) -> None:
        channels = self._scale_factors.trained()
        if channels is not None and not has_skipped(optimizer):
            near_zero = channels.values().abs() < self.near_zero_thr
            self.schedule.update(near_zero.double().mean().item(), _progress(runner))

    def _rates(self, runner, channels: Channels) -> Union[float, Tensor]:
        magnitudes = channels.magnitudes(channels.values())
        rates = self.schedule.rates(magnitudes, self.rate, _progress(runner))
        return rates if channels.rate_factors is None else rates * channels.rate_factors

    def _log_scalars(self, runner) -> None:
        channels = self._scale_factors.trained()
        if channels is None:
            return
        figures = summarize(channels, self._rates(runner, channels), self.near_zero_thr,
                            by_group=bool(self.groups))
        for name, value in figures.items():
            runner.message_hub.update_scalar(f'train/{name}', value)

    @master_only
    def _log_histogram(self, runner) -> None:
        channels = self._scale_factors.trained()
        if channels is not None:
            step = runner.epoch + 1
            title = f'epoch {step}, iteration {runner.iter}, rate {self.rate:g}'
            try:
                show_histograms(runner.visualizer, channels, self.near_zero_thr, title, step,
                                by_group=bool(self.groups))
            except Exception as error:  # of backends, files and matplotlib: a picture ends nothing
                runner.logger.warning('Sparsity: there is no histogram of this epoch: '
                                      f'{type(error).__name__}: {error}')


def _progress(runner) -> float:
    """The share of the training that is done, in [0, 1)."""
    return runner.iter / runner.max_iters


def _optimizers(optim_wrapper) -> List[torch.optim.Optimizer]:
    if isinstance(optim_wrapper, OptimWrapperDict):
        return [wrapper.optimizer for wrapper in optim_wrapper.values()]
    return [optim_wrapper.optimizer]
