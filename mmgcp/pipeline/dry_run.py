# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A dry run of all stages, which finds mistakes that would end one of them after hours."""
import copy
import tempfile
from pathlib import Path
from typing import Callable, Optional, Sequence

import torch
from mmengine.config import Config

from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import load_strictly

from .rehearsal import rehearse_training
from .tool_runner import ToolRunner


def rehearse_stages(tools: ToolRunner, baseline: Path, checkpoint: Optional[str],
                    prune_arguments: Sequence[str],
                    sparse: Optional[Callable[[Config, str], Config]],
                    distill: Callable[[Config, str], Config]) -> None:
    """Build what each stage consists of, and plan the pruning, before the first one begins.

    Where the trained detector is not there yet, one with the weights of the checkpoint, or
    untrained, takes its place; so does the baseline for the pruned detector.

    Args:
        tools (ToolRunner): The tools.
        baseline (Path): Config of the first stage.
        checkpoint (str, optional): The trained detector, None if it will be trained.
        prune_arguments (Sequence[str]): Those of prune.py behind the checkpoint.
        sparse (Callable, optional): Makes the config of sparse training from the baseline's, and
            the checkpoint. None for no sparse training.
        distill (Callable): Makes the config of distillation from the student's, and the
            teacher's checkpoint.

    Raises:
        UserError: A stage would fail; says which and why.
    """
    cfg = Config.fromfile(str(baseline))
    trained = None
    if not checkpoint:
        trained = _stage('baseline', lambda: rehearse_training(cfg))
    cfg.load_from = None
    if sparse:
        config = _stage('sparse', lambda: sparse(copy.deepcopy(cfg), ''))
        trained = _stage('sparse', lambda: rehearse_training(config, with_data=trained is None))
    elif trained is None:
        trained = _stage('distilled', lambda: rehearse_training(cfg))
    if checkpoint:
        load_strictly(trained, checkpoint, str(baseline))
    script = tools.load('prune.py')
    arguments = tools.parse('prune.py', str(baseline), 'checkpoint', *prune_arguments)
    _stage('prune', lambda: script.rehearse(arguments, copy.deepcopy(cfg), trained))
    with tempfile.TemporaryDirectory() as folder:
        teacher = str(Path(folder) / 'teacher.pth')
        torch.save(dict(state_dict=trained.state_dict()), teacher)
        config = _stage('distilled', lambda: distill(copy.deepcopy(cfg), teacher))
        _stage('distilled', lambda: rehearse_training(config, with_data=False))


def _stage(name: str, work: Callable):
    """Do something for a stage, whose name errors get."""
    try:
        return work()
    except UserError as error:
        raise UserError(f'the stage {name} would fail: {error}') from error
