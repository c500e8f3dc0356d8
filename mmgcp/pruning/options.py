# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options of :func:`mmgcp.pruning.prune`: the one list from which all others follow.

These are the function's arguments, the settings of ``prune_cfg``, the switches of
``tools/prune.py``, what a plan records, and the table in the documentation.
"""
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Sequence, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.deployment.timing import RUNTIMES
from mmgcp.errors import PruningError
from mmgcp.nn.forward import IMAGE_SHAPE
from mmgcp.nn.training_loss import Batch
from mmgcp.utils.checks import (
    BOOLEAN,
    CONFIG,
    COUNT,
    FUNCTION,
    INPUT_SHAPE,
    ITERABLE,
    MAPPING,
    NAMES,
    PATH,
    check_keys,
    check_value,
    either,
    instance_of,
    number_in,
    one_of,
)
from mmgcp.utils.options import check_options, option

from .blocks.scores import BLOCK_CRITERIA, COMPENSATED
from .layer_groups import Groups, read_groups
from .plan import PruningPlan
from .scores import criterion_names
from .scores.base import Progress
from .select import MERGES
from .surgery import Channels
from .units import RATIO

AMOUNT, CHANNELS, OTHER = 'how much', 'which channels', 'other'

KEEP_SHARE = number_in(0, 1, 'is the share to keep, in (0, 1]', open_low=True)
ALLOCATIONS = ('global', 'uniform', 'measured')
AUTO = 'auto'
TARGETS = ('target_params', 'target_flops', 'target_latency')
BUDGETS = ('ratio', *TARGETS)
# What --round-to is where speed matters: with AVX-512, programs compute channels in blocks of 16.
# docs/deployment.md has what that, 8 and 1 lead to
BLOCK = 16


@dataclass
class PruneOptions:
    """Options of pruning; raises a PruningError if a value is not allowed.

    Notes of a field: ``in_config`` if ``prune_cfg`` may have it, ``recorded`` if the plan does.
    """
    groups: Groups = option(
        'auto', in_config=True,
        help="layer groups, each with a ratio, a threshold or neither, which leaves it to the "
        "budget; 'auto' makes them by kind of module and stride")
    ratio: Optional[float] = option(
        None, in_config=True, recorded=True, check=RATIO, cli=dict(group=AMOUNT, type=float),
        help='share of the channels of every layer group that is to go, those with the lowest '
        "scores, instead of the groups' own ratios and thresholds")
    target_params: Optional[float] = option(
        None, in_config=True, recorded=True, check=KEEP_SHARE,
        cli=dict(group=AMOUNT, type=float), help='share of the parameters to keep')
    target_flops: Optional[float] = option(
        None, in_config=True, recorded=True, check=KEEP_SHARE,
        cli=dict(group=AMOUNT, type=float), help='share of the MACs to keep')
    target_latency: Optional[float] = option(
        None, in_config=True, recorded=True,
        check=number_in(0, math.inf, 'must be milliseconds above 0', open_low=True,
                        open_high=True),
        cli=dict(group=AMOUNT, type=float, metavar='MS'),
        help='milliseconds that an image is to take on one thread of this machine, met within 5%')
    runtime: str = option(
        'onnxruntime', in_config=True, recorded=True, check=one_of(*RUNTIMES),
        cli=dict(group=AMOUNT, choices=RUNTIMES),
        help='the program in which target_latency is meant and measured')
    latency_table: Union[str, Path, None] = option(
        None, in_config=True, check=PATH, cli=dict(group=AMOUNT, metavar='FILE'),
        help='JSON file with times of layers for target_latency, which is written or completed '
        'where it lacks some; without one they are measured anew each time')
    steps: int = option(
        1, in_config=True, recorded=True,
        check=number_in(1, 1000, integer=True),
        cli=dict(group=AMOUNT, type=int, metavar='N'),
        help='get there in so many steps, each of which removes the same share of what is left '
        'and scores channels anew, with training in between')
    round_to: Optional[int] = option(
        None, in_config=True, recorded=True,
        check=number_in(1, math.inf, 'must be a positive integer', integer=True),
        cli=dict(group=AMOUNT, type=int, metavar='N'),
        default_help=f"the config's, else {BLOCK} for tools/prune.py and target_latency, else 1",
        help='keep multiples of so many channels, without exceeding the budget')
    remove_blocks: Union[Sequence[str], int, str, None] = option(
        None, in_config=True, recorded=True,
        check=either(NAMES, COUNT, one_of(AUTO), text="must be names of blocks, their number, or "
                     "'auto'"),
        cli=dict(group=AMOUNT, nargs='+', metavar='BLOCK'),
        help="blocks that are removed as a whole: their names; or a number of those that cost "
        "the least of the loss for their MACs; or 'auto' for as many of these as lead to the least "
        'loss with the budget')
    plain_blocks: bool = option(
        False, in_config=True, recorded=True, check=BOOLEAN,
        cli=dict(group=AMOUNT, action='store_true'),
        help="let a number or 'auto' in remove_blocks choose blocks without a shortcut, too: the "
        'next block then reads what they have read')
    block_criterion: str = option(
        COMPENSATED, in_config=True, recorded=True, check=one_of(*BLOCK_CRITERIA),
        cli=dict(group=AMOUNT, choices=BLOCK_CRITERIA),
        help='how blocks are chosen: by the training loss without each of them after or before '
        'compensation, or by a first-order estimate of the latter')
    min_keep_ratio: float = option(
        0.01, in_config=True, recorded=True, check=number_in(0, 1, 'must be in [0, 1]'),
        cli=dict(group=AMOUNT, type=float, metavar='SHARE'),
        help='share of the channels of a layer that stays at least')
    criterion: Optional[dict] = option(
        None, in_config=True, recorded=True, check=CONFIG,
        cli=dict(group=CHANNELS, choices=criterion_names, metavar='NAME'),
        default_help='OBS where there are training data, else BNScale',
        help='how channels are scored: the config of a criterion, of which the command line '
        'takes the name')
    allocation: Optional[str] = option(
        None, in_config=True, recorded=True, check=one_of(None, *ALLOCATIONS),
        cli=dict(group=CHANNELS, choices=ALLOCATIONS),
        default_help="the criterion's, see docs/criteria.md",
        help="how many channels a unit loses: as many as are below the one threshold of their "
        "group ('global'), or the same share of each unit, those with the lowest scores "
        "('uniform': ratios and thresholds of groups are this share); or a share of each unit "
        'that is the smaller, the more the average precision on the batches suffers without '
        "channels of its group ('measured')")
    merge: str = option(
        'or', in_config=True, recorded=True, check=one_of(*sorted(MERGES)),
        cli=dict(group=CHANNELS, choices=tuple(MERGES)),
        help='how layers whose channels can only go together decide on one: it stays if any of '
        'them (or), or more than half (majority), would keep it; mean and sum are of their scores'
        )
    plan: Union[PruningPlan, str, Path, None] = option(
        None, check=either(PATH, instance_of(PruningPlan, text=''), text='must be a plan, or its '
                           'file'), cli=dict(group=CHANNELS, metavar='FILE'),
        help='what to remove, perhaps edited by hand; nothing else decides it then')
    compensate: Union[bool, str] = option(
        True, in_config=True, recorded=True,
        check=one_of(True, False, 'fold-means', 'adapt-norms', 'reconstruct'),
        cli=dict(group=OTHER, choices=('fold-means', 'adapt-norms', 'reconstruct')),
        default_help='reconstruct where there are training images, else fold-means',
        help='make up for what removed channels emit: fold its mean into the layers that read '
        'them, adapt their BatchNorms, too, or fit all layers behind to their original outputs')
    finetune: Optional[Callable[[nn.Module, int], None]] = option(
        None, in_config=True, check=FUNCTION,
        help='training between channel units, with a layer-wise criterion, or between steps: '
        'called with the model and the number of finished units or steps; prune_cfg has its '
        'settings (epochs, lr, every), or False for none')
    recover: Optional[Callable[[nn.Module, nn.Module, Channels], dict]] = option(
        None, in_config=True, check=FUNCTION,
        help='training without labels at the end, and between steps if there is no finetune: '
        'called with the pruned model, a copy of the original, and the channels that its layers '
        'have lost; the report has what it returns; prune_cfg has its settings (minutes, steps, '
        'lr)')
    input_shape: Sequence[int] = option(
        IMAGE_SHAPE, recorded=True, check=INPUT_SHAPE,
        help='shape (C, H, W) of an image in pixels, which MACs are counted for')
    calibration: Optional[Iterable[Tensor]] = option(
        None, check=ITERABLE,
        help='batches (N, C, H, W) of preprocessed images to measure on what is made up '
        'for; without them only constants are; each process has its own')
    batches: Optional[Iterable[Batch]] = option(
        None, check=ITERABLE,
        help='batches of training data, on the device of the model, for criteria that need '
        'them; each process has its own')
    evaluate: Optional[Callable[[nn.Module], float]] = option(
        None, check=FUNCTION,
        help='gives a metric of a model, higher is better; the budget is spent where this '
        'metric suffers least')
    checkpoint_file: Union[str, Path, None] = option(
        None, check=PATH,
        help='file for what is done after each unit, with a layer-wise criterion, or after '
        'each step: the same request for the same weights goes on from there')
    dry_run: bool = option(
        False, check=BOOLEAN, help='make the plan and leave the model alone')
    progress: Progress = option(
        factory=lambda: lambda stage, done, steps: None, check=FUNCTION, default_help='nothing',
        help='called with a stage, the steps done in it, and all its steps')

    def __post_init__(self):
        self.remove_blocks = _one_or_names(self.remove_blocks)
        check_options(self, PruningError)
        read_groups(self.groups)
        for first, others in (('ratio', TARGETS), ('target_flops', ['target_latency'])):
            for name in others:
                if getattr(self, first) is not None and getattr(self, name) is not None:
                    raise PruningError(
                        f'{first}={getattr(self, first)} and {name}={getattr(self, name)} exclude '
                        'each other: both say how much is pruned')
        if self.remove_blocks == AUTO and self.plan is None and self.only_blocks:
            raise PruningError("remove_blocks='auto' needs to know how much is pruned: give "
                               f'{", ".join(BUDGETS)}, or ratios of layer groups')
        if self.round_to is None:
            self.round_to = 1 if self.target_latency is None else BLOCK
        if self.criterion is None:
            self.criterion = dict(type='mmgcp.BNScale' if self.batches is None else 'mmgcp.OBS')
        for name in ('calibration', 'batches'):  # they are gone through several times
            if isinstance(getattr(self, name), Iterator):
                setattr(self, name, list(getattr(self, name)))

    @property
    def only_blocks(self) -> bool:
        """Whether blocks are removed, but no channels, as nothing says how many."""
        return (self.remove_blocks is not None
                and all(getattr(self, name) is None for name in BUDGETS)
                and all(group.ratio is None and group.threshold is None
                        for group in read_groups(self.groups) or ()))

    @property
    def finetune_settings(self) -> Any:
        """What a plan records of the training in between: its settings if it tells them."""
        return _settings_of(self.finetune)

    @property
    def recover_settings(self) -> Any:
        """The same of the recovery."""
        return _settings_of(self.recover)

    def record(self) -> Dict[str, Any]:
        """Return the options that a plan records."""
        found = {item.name: getattr(self, item.name) for item in fields(self)
                 if item.metadata.get('recorded')}
        return dict(found, criterion=_with_names(self.criterion),
                    input_shape=list(self.input_shape))


def _with_names(config: Any) -> Any:
    """Copy a config, with the names of classes in their places."""
    if isinstance(config, dict):
        return {key: _with_names(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return list(map(_with_names, config))
    return f'mmgcp.{config.__name__}' if isinstance(config, type) else config


def _settings_of(training: Optional[Callable]) -> Any:
    return training and getattr(training, 'settings', True)


def _one_or_names(value: Any) -> Any:
    """Turn what a command line has for blocks, a list of words, into one of the allowed forms."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        word = value[0]
        return int(word) if word.isdecimal() else AUTO if word == AUTO else value
    return value


def options_of_config(config: Dict[str, Any], owner: str) -> Dict[str, Any]:
    """Return the options that a ``prune_cfg`` of someone has.

    Raises a PruningError that names the owner if it has anything else.
    """
    allowed = [item.name for item in fields(PruneOptions) if item.metadata.get('in_config')]
    check_value(f'prune_cfg of {owner}', config, MAPPING, PruningError)
    check_keys(config, allowed, f'prune_cfg of {owner}', PruningError)
    return dict(config)
