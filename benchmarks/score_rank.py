# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Whether the scores of plans tell which of them are better once they have been trained.

Fine-tunes each model of a folder of ``tools/analysis_tools/pareto.py`` alike, with the data of its
config and the loop of peers.py, and prints Spearman's rank correlation of the scores right after
pruning with the accuracies after that. A model that has been trained is not trained again.

  python benchmarks/score_rank.py work_dirs/pareto --epochs 2
"""
import argparse
import json
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import torch
from peers_data import loader_without_workers
from peers_training import LR, OPTIM_WRAPPER, train
from prune_speed import _markdown, describe_machine
from runs import Runs

from mmgcp.datasets.calibration import evaluate
from mmgcp.errors import UserError
from mmgcp.pipeline.pareto import ORIGINAL
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import with_fixed_size
from mmgcp.utils.detectors import load_detector


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='the work dir of pareto.py, with pareto.json')
    parser.add_argument('--epochs', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--lr', type=float, default=LR, help='of AdamW; default: %(default)s')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--metric', help='which accuracy; default: that of the scores')
    return parser.parse_args()


def read_rows(folder: Path) -> List[dict]:
    """The pruned models of a folder with their scores, the best first.

    Raises:
        UserError: There are fewer than three, or they were scored by a loss.
    """
    try:
        rows = json.loads((folder / 'pareto.json').read_text())['models']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder} has no pareto.json that can be read: {error}') from error
    rows = [row for row in rows if row['name'] == row['model'] != ORIGINAL]
    if len(rows) < 3:
        raise UserError(f'{folder} has {len(rows)} pruned models, too few for a correlation')
    if any('metric' not in row for row in rows):
        raise UserError(f'{folder} was scored by the loss, not by an accuracy')
    return sorted(rows, key=lambda row: -row['score'])


def finetune(runs: Runs, row: dict, args: argparse.Namespace) -> float:
    """Fine-tune a model, unless that has been done; returns its accuracy."""
    name = f'{row["model"]}-{args.epochs}epochs-{args.seed}'
    inputs = dict(kind='finetuned', model=row['model'], score=row['score'], epochs=args.epochs,
                  lr=args.lr, seed=args.seed, metric=args.metric)
    if not runs.is_done(name, inputs):
        folder = args.folder / row['model']
        entry = load_detector(str(folder / 'pruned.py'), str(folder / 'pruned.pth'))
        entry.cfg.optim_wrapper = OPTIM_WRAPPER
        entry.cfg.train_dataloader = loader_without_workers(entry.cfg, 'train_dataloader')
        seconds = train(entry.model, entry.cfg, args.epochs, args.lr, args.seed)
        found = evaluate(entry.model, with_fixed_size(entry.cfg), args.metric or row['metric'],
                         row['val_images'])
        runs.finish(name, inputs, dict(accuracy=found[1], epoch_seconds=seconds))
    return runs.result(name)['accuracy']


def report(rows: List[dict], accuracies: Dict[str, float], epochs: int) -> str:
    """A table of scores and accuracies by name of the model, and their rank correlation."""
    table = [['model', 'MACs', 'right away', f'after {epochs} epochs']]
    table += [[row['model'], f'{row["macs"] / 1e9:.3f} G', f'{row["score"]:.3f}',
               f'{accuracies[row["model"]]:.3f}'] for row in rows]
    scores, found = zip(*((row['score'], accuracies[row['model']]) for row in rows))
    return '\n'.join([*_markdown(table), '', f'Spearman: {rank_correlation(scores, found):.3f}'])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equal values share the mean."""
    ranks = [[np.less(values, value).sum() + np.equal(values, value).sum() / 2
              for value in values] for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(1)
    rows, runs = read_rows(args.folder), Runs(args.folder / 'finetuned')
    accuracies = {row['model']: finetune(runs, row, args) for row in rows}
    print(describe_machine(threads=1))
    print(report(rows, accuracies, args.epochs))


if __name__ == '__main__':
    run_tool(main)
