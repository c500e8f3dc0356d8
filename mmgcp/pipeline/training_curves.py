# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The picture of the trainings of all stages, from what they have logged."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set

from mmgcp.analysis.stage_plots import StageCurve, plot_stages
from mmgcp.errors import UserError
from mmgcp.utils.cli import replacing

from .summary import METRICS
from .training_log import read_log

# The stages that train, and the rows of the summary with the accuracy before and after each
STAGES = dict(baseline=(None, 'baseline'), sparse=('baseline', 'sparse'),
              distilled=('pruned', 'distilled'))
METRIC = 'mAP50'


def draw_curves(folder: Path, rows: Sequence[dict], path: Path) -> bool:
    """Draw loss and accuracy over the epochs of the stages that have been trained.

    Args:
        folder (Path): The work_dir of :func:`mmgcp.pipeline.compress.compress`, with a folder for
            each stage.
        rows (Sequence[dict]): The stages of its summary.
        path (Path): The PNG file to write.

    Returns:
        bool: Whether there was anything to draw.

    Raises:
        UserError: A log cannot be read.
    """
    accuracy = {row['stage']: row[METRIC] for row in rows}
    curves: List[StageCurve] = []
    names: Set[str] = set()  # of the losses of the first stage, which later ones add some to
    for stage, (before, after) in STAGES.items():
        if after not in accuracy:  # what there is of it is left of an earlier run
            continue
        trained = read_log(folder / stage, _has_losses, 'a training')
        if not trained:
            continue
        names = names or _loss_names(trained[0])
        epochs = _epochs(trained)
        curves.append(StageCurve(
            stage, epochs, [_sum_of(row, names) for row in trained],
            [row['loss'] for row in trained],
            [(float(row['step']), _accuracy(row) or 0.)  # its step is the epoch
             for row in read_log(folder / stage, _has_accuracy, 'a training')],
            accuracy.get(before), accuracy.get(after)))
    if curves:
        with replacing(path) as (temporary, ):
            plot_stages(curves, METRIC, temporary)
    return bool(curves)


def _has_losses(row: Any) -> bool:
    """Whether a line is about training; raises a UserError if it is of no training."""
    if not isinstance(row, dict):
        raise UserError
    if 'loss' in row and not all(type(row.get(name)) in (int, float)
                                 for name in ('step', 'epoch', 'loss', *_loss_names(row))):
        raise UserError
    return 'loss' in row


def _has_accuracy(row: Any) -> bool:
    """Whether a line is about a validation."""
    return isinstance(row, dict) and _accuracy(row) is not None and type(row.get('step')) is int


def _loss_names(row: Dict[str, Any]) -> Set[str]:
    return {name for name in row if name.startswith('loss_')}


def _sum_of(row: Dict[str, Any], names: Set[str]) -> float:
    """The losses of some names, or of all where the line lacks one."""
    return sum(row[name] for name in names) if names and names <= set(row) else row['loss']


def _epochs(rows: Sequence[dict]) -> List[float]:
    """Epochs from the beginning of the training, of which the log only has whole ones.

    The iterations of an epoch are the fewest with which none of them ends too early.
    """
    length = max(max(row['step'] / max(row['epoch'], 1) for row in rows), 1.)
    return [row['step'] / length for row in rows]


def _accuracy(row: Dict[str, Any]) -> Optional[float]:
    """The accuracy of a line about a validation."""
    return next((value for name, value in row.items() if name.split('/')[-1] in METRICS[METRIC]
                 and type(value) in (int, float)), None)
