# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What sparse training and distilling add to pruning and fine-tuning, on real training.

1. The detector of the config is trained: the baseline.
2. It is sparse-trained with each schedule of the rate (constant, the paper's two phases) and
   pruned to the same budget: the share of scale factors near zero, and the accuracy before and
   right after pruning.
3. The network pruned after the two phases is trained on in several ways, for the same epochs:
   plain fine-tuning, and that with one loss of distilling from the baseline.

A run that is finished is not run again: what has been done by an earlier start with the same
--work-dir is taken from there, so several starts with other --seeds or --steps may share the
work, too. Each start prints all that is there.
"""
import argparse
from collections import defaultdict
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config
from prune_speed import ROOT, _markdown, describe_machine
from runs import Runs, base, digest, evaluation, pair, train_for

from mmgcp.pipeline.child_config import override
from mmgcp.utils.cli import run_tool

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py'
RECIPES = ('finetune', 'attention', 'response', 'cwd')
TITLES = dict(finetune='fine-tuning', attention='+ spatial attention', response='+ response',
              cwd='+ channel-wise')


def distillation(recipe: str, weight: float) -> Optional[dict]:
    """The distiller's settings for a recipe, None for plain fine-tuning.

    Args:
        recipe (str): One of :data:`RECIPES`.
        weight (float): Multiplier of the losses; with 1 they have their usual weights.
    """
    if recipe == 'attention':  # what groups='auto' stands for
        return dict(groups=[
            dict(name='backbone', weight=1e2 * weight, layers='backbone_outputs'),
            dict(name='neck', weight=1. * weight, layers='neck_outputs')])
    if recipe == 'response':
        return dict(groups=[], response=dict(
            type='mmgcp.ResponseLoss', weights=dict.fromkeys(('cls', 'obj', 'box'), weight)))
    if recipe == 'cwd':
        return dict(groups=[dict(name='neck', weight=weight, layers='neck_outputs',
                                 loss=dict(type='mmgcp.ChannelWiseLoss'))])
    return None


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(CONFIG), help='default: the small YOLOv4')
    parser.add_argument('--work-dir', type=Path,
                        help='default: work_dirs/training_recipes/CONFIG_NAME')
    parser.add_argument('--steps', nargs='+', choices=('sparsity', 'recipes'),
                        default=['sparsity', 'recipes'], help='default: both')
    parser.add_argument('--sparse-epochs', type=int, default=24)
    parser.add_argument('--two-phase-rate', type=float, default=8e-3, help='default: 8e-3')
    parser.add_argument('--constant-rates', type=float, nargs='*', default=[8e-3],
                        help='several, to find one with the same share near zero; default: 8e-3')
    parser.add_argument('--target-params', type=float, default=0.1,
                        help='share of the parameters to keep; default: 0.1')
    parser.add_argument('--epochs', type=int, default=12, help='of the recipes; default: 12')
    parser.add_argument('--recipes', nargs='+', choices=RECIPES, default=RECIPES)
    parser.add_argument('--distill-weight', type=float, default=1.,
                        help='multiplier of the losses of distilling; default: 1')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of the recipes')
    return parser.parse_args()


def main():
    args = parse_args()
    name = Path(args.config).stem
    runs = RecipeRuns(args.work_dir or Path('work_dirs') / 'training_recipes' / name)
    baseline = runs.baseline(args.config)
    schedules = [('two_phase', args.two_phase_rate)]
    if 'sparsity' in args.steps:
        schedules += [('constant', rate) for rate in args.constant_rates]
    for schedule, rate in schedules:
        runs.sparse(args.config, baseline, schedule, rate, args.sparse_epochs)
        runs.prune(args.config, schedule, rate, args.target_params)
    if 'recipes' in args.steps:
        for seed in args.seeds:
            for recipe in args.recipes:
                runs.recipe(args, baseline, recipe, seed)
    print_tables(runs)


class RecipeRuns(Runs):
    """The trainings that are compared."""

    def baseline(self, config: str) -> Path:
        """Train the detector of a config; returns its last checkpoint."""
        return self.train('baseline', base(config), lambda cfg: override(cfg, evaluation()), 0,
                          dict(kind='baseline'))

    def sparse(self, config: str, baseline: Path, schedule: str, rate: float,
               epochs: int) -> Path:
        """Sparse-train the baseline; returns its last checkpoint."""
        hook = dict(type='mmgcp.DynamicSparsityHook', rate=rate, schedule=dict(type=schedule),
                    modules='prunable')
        return self.train(
            _sparse_name(schedule, rate), base(config), lambda cfg: override(cfg, {
                'load_from': str(baseline), 'custom_hooks': [*cfg.custom_hooks, hook],
                **train_for(epochs), **evaluation()}), 0,
            dict(kind='sparse', schedule=schedule, rate=rate, epochs=epochs),
            ['sparsity_near_zero'])

    def prune(self, config: str, schedule: str, rate: float, target_params: float) -> Path:
        """Prune a sparse network and test it; returns the folder of the pruned one."""
        name = _sparse_name(schedule, rate)
        folder = self.folder / f'{name}-pruned'
        inputs = dict(kind='pruned', schedule=schedule, rate=rate, target_params=target_params)
        inputs['start'] = digest(self.result(name) or {})
        if not self.is_done(folder.name, inputs):
            self.run('prune.py', self.folder / 'baseline.py', self.checkpoint(name),
                     '--work-dir', folder, '--target-params', target_params, '--val-images', 0)
            self.finish(folder.name, inputs, self.test(folder))
        return folder

    def recipe(self, args: argparse.Namespace, baseline: Path, recipe: str, seed: int) -> Path:
        """Train the pruned network on; returns its last checkpoint."""
        pruned = f'{_sparse_name("two_phase", args.two_phase_rate)}-pruned'
        extra = distillation(recipe, args.distill_weight)

        def change(cfg: Config) -> Config:
            cfg = override(cfg, {**train_for(args.epochs), **evaluation()})
            if extra:
                cfg.model = dict(
                    type='mmgcp.SpatialAttentionDistiller', student=cfg.model, teacher=dict(
                        config=str(self.folder / 'baseline.py'), checkpoint=str(baseline)), **extra)
            return cfg

        weight = args.distill_weight if extra else 1.
        inputs = dict(kind='recipe', recipe=recipe, weight=weight, seed=seed, epochs=args.epochs,
                      start=digest(self.result(pruned) or {}))
        return self.train(
            f'{recipe}-{weight:g}-{seed}', f'./{pruned}/pruned.py', change, seed, inputs)


def _sparse_name(schedule: str, rate: float) -> str:
    return f'{schedule}-{rate:g}'


def print_tables(runs: Runs) -> None:
    """Print all that is finished in Markdown."""
    for item in runs.results('baseline'):
        print(f'\nBaseline: mAP50 {item["mAP50"]:.3f}, mAP {item["mAP"]:.3f}\n')
    pruned = {(item['inputs']['schedule'], item['inputs']['rate']): item
              for item in runs.results('pruned')}
    rows = []
    for item in sorted(runs.results('sparse'), key=lambda item: -item['inputs']['rate']):
        schedule, rate = item['inputs']['schedule'], item['inputs']['rate']
        after = pruned.get((schedule, rate))
        rows.append([schedule, f'{rate:g}', f'{item["sparsity_near_zero"]:.1%}',
                     pair([item]), pair([after] if after else [])])
    if rows:
        header = ['schedule', 'rate', 'near zero', 'mAP50 / mAP', 'right after pruning']
        print('\n'.join(_markdown([header, *rows])))
    recipes = defaultdict(list)
    for item in sorted(runs.results('recipe'), key=lambda item: item['inputs']['seed']):
        inputs = item['inputs']
        key = RECIPES.index(inputs['recipe']), -inputs['weight'], inputs['epochs']
        recipes[key].append(item)
    rows = [[TITLES[RECIPES[number]], f'{-weight:g}' if number else '-', str(epochs), pair(items),
             ', '.join(f'{item["mAP50"]:.3f}' for item in items),
             ', '.join(f'{item["mAP"]:.3f}' for item in items)]
            for (number, weight, epochs), items in sorted(recipes.items())]
    if rows:
        header = ['recipe', 'weight', 'epochs', 'mAP50 / mAP', 'mAP50 by seed', 'mAP by seed']
        print('\n'.join(['', *_markdown([header, *rows])]))
    machine = describe_machine(torch.get_num_threads())
    print('\n' + ', '.join(f'{key} {value}' for key, value in machine.items()))


if __name__ == '__main__':
    run_tool(main)
