# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""All stages: train, sparsify, prune, distil; each is tested, and all are compared."""
import argparse
import copy
import shlex
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, check_voc, choose_splits
from mmgcp.errors import UserError
from mmgcp.pruning.options import BUDGETS, TARGETS
from mmgcp.utils.checkpoint import load_strictly, read_checkpoint
from mmgcp.utils.checks import check_value
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import build_detector, load_config
from mmgcp.utils.config_content import plain_content
from mmgcp.utils.devices import find_device
from mmgcp.utils.folders import work_dir
from mmgcp.utils.options import check_of

from .child_config import write_child
from .compress_options import CompressOptions
from .dry_run import rehearse_stages
from .pictures import draw_detections
from .schedules import base_epochs, default_epochs
from .stage_configs import baseline_config, distill_config, sparse_config, sparsity_hook
from .state import State
from .summary import choose_metrics, measure_stages, too_weak, write_summary
from .tool_runner import ToolRunner
from .training_curves import draw_curves
from .voc_data import num_training_images

# From fewer images a detector without trained weights may learn next to nothing
FEW_IMAGES = 200
# Settings of the user's config that the training of the baseline does not depend on
LATER_SETTINGS = ('sparse_epochs', 'sparsity_rate', 'prune_cfg', 'distill_epochs',
                  'attention_groups')


def compress(options: CompressOptions) -> List[dict]:
    """Run all stages, except those that an earlier run has finished, and write the summary.

    ``work_dir`` gets the config of each stage (baseline.py, sparse.py, pruned/pruned.py,
    distilled.py), its checkpoints and log, ``summary.json``, ``summary.md``, and
    the pictures ``detections.png`` and ``curves.png``.

    Args:
        options (CompressOptions): What to do.

    Returns:
        list[dict]: For each stage, baseline first: its ``stage``, ``mAP50``, ``mAP``,
        ``parameters``, ``macs`` (for one image) and ``latency_ms`` (in PyTorch, fused, on one
        thread of the CPU).

    Raises:
        UserError: The options do not fit together, ``work_dir`` cannot be written to or another
            run works in it, or a stage failed.
    """
    given = Path(options.checkpoint or '')
    # A checkpoint of a training has a state of the optimizer beside the weights
    with work_dir(options.work_dir, 2 * given.stat().st_size if given.is_file() else 0):
        return _Pipeline(options).run()


class _Pipeline:
    """The stages in their order, with what one hands to the next."""

    def __init__(self, options: CompressOptions):
        self.options = options
        self.cfg = load_config(options.config, copy.deepcopy(options.cfg_options))
        self.epochs = options.epochs or base_epochs(self.cfg)
        self.folder = options.work_dir.resolve()
        self.tools = ToolRunner(options.tools_dir, self.folder)
        self.prune_arguments = self._prune_arguments()
        self.voc: Optional[VOCInfo] = check_voc(options.data) if options.data else None
        self.checkpoint = self._given_checkpoint()
        self.pruned = self.folder / 'pruned' / 'pruned.py'
        self._rehearse()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.baseline = self._write_baseline_config(self.folder)
        self.state = State(self.folder / 'state.json')

    def run(self) -> List[dict]:
        trained = self._train_baseline()
        rows = [self._test('baseline', self.baseline, trained)]
        if too_weak(rows[0]):
            print(f'warning: {too_weak(rows[0])}', flush=True)
        unpruned = [trained]
        if self._epochs('sparse'):
            unpruned.append(self._train_sparse(trained))
            rows.append(self._test('sparse', self.baseline, unpruned[-1]))
        self._prune(unpruned[-1])
        rows.append(self._test('pruned', self.pruned, str(self.pruned.with_suffix('.pth')),
                               self.pruned.read_text()))  # which may also be pruned by hand
        distilled = self._distill(trained)
        rows.append(self._test('distilled', self.pruned, distilled))
        sizes = self._measure(unpruned, [str(self.pruned.with_suffix('.pth')), distilled])
        rows = [{**row, **size} for row, size in zip(rows, sizes)]
        write_summary(rows, self.folder)
        self._draw('detections', partial(draw_detections, [
            ('baseline', self.baseline, trained), ('distilled', self.pruned, distilled)]))
        self._draw('curves', partial(draw_curves, self.folder, rows))
        return rows

    def _draw(self, name: str, draw: Callable[[Path], object]) -> None:
        """Draw a picture, without which nothing ends."""
        try:
            draw(self.folder / f'{name}.png')
        except Exception as error:
            print(f'warning: there is no picture {name}.png: {type(error).__name__}: {error}')

    def _prune_arguments(self) -> List[str]:
        """Return the arguments for prune.py, checked now and not after hours of training."""
        try:
            arguments = shlex.split(self.options.prune_options)
        except ValueError as error:
            raise UserError(f'--prune-options cannot be read: {error} in '
                            f'{self.options.prune_options!r}') from error
        for name in ('target_params', 'target_flops'):
            value = getattr(self.options, name)
            if value is not None:
                arguments += [f'--{name.replace("_", "-")}', str(value)]
        parsed = self.tools.parse('prune.py', self.options.config, 'checkpoint', *arguments)
        if parsed.dry_run or parsed.work_dir or parsed.launcher != 'none':
            raise UserError('--prune-options must not have --dry-run, --work-dir or --launcher')
        find_device(parsed.device)
        if 'prune_cfg' not in self.cfg and parsed.plan is None and all(
                getattr(parsed, name) is None for name in BUDGETS):
            raise UserError(f'the config {self.options.config} has no prune_cfg: say how much to '
                            'prune with --target-params or --target-flops')
        if self._epochs('sparse') and parsed.calib_batches and self._leaves_criterion(parsed):
            arguments += ['--criterion', 'BestOf']  # whether sparse training was long enough
        if parsed.val_images is None and not (parsed.sensitivity or parsed.metric):
            arguments += ['--val-images', '0']  # each stage is tested
        return arguments

    def _leaves_criterion(self, parsed: argparse.Namespace) -> bool:
        """Whether nothing says how channels are chosen, and a budget says how much goes."""
        cfg = self.cfg.get('prune_cfg')
        cfg = cfg if isinstance(cfg, dict) else {}
        if parsed.plan or parsed.criterion or cfg.get('criterion') or parsed.ratio is not None:
            return False
        return any(getattr(parsed, name) is not None or cfg.get(name) is not None
                   for name in TARGETS)

    def _given_checkpoint(self) -> Optional[str]:
        checkpoint = self.options.checkpoint
        if not checkpoint or '://' in checkpoint:
            return checkpoint
        if not Path(checkpoint).is_file():
            raise UserError(f'there is no checkpoint {checkpoint}')
        return str(Path(checkpoint).resolve())

    def _rehearse(self) -> None:
        """Look for mistakes in all stages before anything is written."""
        with tempfile.TemporaryDirectory() as folder:
            self.baseline = self._write_baseline_config(Path(folder))
            if self.checkpoint:
                self._check_checkpoint()
            rehearse_stages(self.tools, self.baseline, self.checkpoint, self.prune_arguments,
                            self._sparse_config if self._epochs('sparse') else None,
                            self._distill_config)

    def _check_checkpoint(self) -> None:
        model = build_detector(load_config(str(self.baseline)))
        read_checkpoint(self.checkpoint)  # an unreadable one has an error of its own
        try:
            load_strictly(model, self.checkpoint, str(self.baseline))
        except UserError as error:
            if 'does not fit' not in str(error):
                raise
            raise UserError(
                f'{error}. To train from the weights that fit, as for other classes, do not give '
                f'the checkpoint after the config, but as --cfg-options '
                f'load_from={self.options.checkpoint}') from None

    def _write_baseline_config(self, folder: Path) -> Path:
        config, options, path = self.options.config, self.options, folder / 'baseline.py'
        write_child(
            path, config if '::' in config else str(Path(config).resolve()),
            lambda cfg: baseline_config(cfg, self.epochs, self.voc, options.cfg_options,
                                        options.lr, self._train_list(folder)))
        return path

    def _train_list(self, to: Path) -> Optional[str]:
        """Join several training splits: the hooks that turn off mosaic need a single data set."""
        splits = choose_splits(self.voc)[0] if self.voc else []
        if len(splits) < 2:
            return None
        folder = self.voc.root / 'ImageSets' / 'Main'
        lines = [line for split in splits
                 for line in (folder / f'{split}.txt').read_text().splitlines() if line.strip()]
        path = to / 'trainval.txt'
        with replacing(path) as (temporary, ):
            temporary.write_text('\n'.join(dict.fromkeys(lines)) + '\n')
        return str(path)

    def _train_baseline(self) -> str:
        if not self.checkpoint:
            images = num_training_images(self.voc)
            if images and images < FEW_IMAGES and not self.cfg.get('load_from'):
                print(f'warning: there are {images} training images and no weights to begin from: '
                      'the detector may learn too little to compare with. --cfg-options '
                      'load_from=CHECKPOINT begins from trained weights, also of other classes.',
                      flush=True)
            return self._train('baseline', self.epochs)
        self.state.run('baseline', (_content(self.baseline), self.checkpoint), dict)
        return self.checkpoint

    def _train_sparse(self, trained: str) -> str:
        write_child(self.folder / 'sparse.py', './baseline.py',
                    lambda cfg: self._sparse_config(cfg, trained))
        return self._train('sparse', self._epochs('sparse'))

    def _sparse_config(self, cfg: Config, trained: str) -> Config:
        options = self.options
        hook = sparsity_hook(Config.fromfile(self.baseline), options.sparsity_rate,
                             options.sparsity_penalty, options.sparsity_schedule)
        return sparse_config(cfg, trained, self._epochs('sparse'), hook, options.sparse_lr,
                             num_training_images(self.voc))

    def _prune(self, unpruned: str) -> None:

        def work() -> dict:
            self.tools.run('prune', 'prune.py', str(self.baseline), unpruned,
                           *self.prune_arguments, '--work-dir', str(self.pruned.parent))
            return {}

        self.state.run('prune', (self.prune_arguments, self.cfg.get('prune_cfg')), work,
                       files=(self.pruned, self.pruned.with_suffix('.pth')))

    def _distill(self, trained: str) -> str:
        write_child(self.folder / 'distilled.py', './pruned/pruned.py',
                    lambda cfg: self._distill_config(cfg, trained))
        return self._train('distilled', self._epochs('distill'))

    def _distill_config(self, cfg: Config, trained: str) -> Config:
        # Those in pruned.py may be older
        groups = Config.fromfile(self.baseline).get('attention_groups', 'auto')
        return distill_config(cfg, str(self.baseline), trained, self._epochs('distill'), groups,
                              self.options.distill_lr, num_training_images(self.voc))

    def _epochs(self, stage: str) -> int:
        """Return the number of epochs of a later stage."""
        name = f'{stage}_epochs'
        given, configured = getattr(self.options, name), self.cfg.get(name)
        if configured is not None:
            check_value(f'{name} of the config', configured, check_of(CompressOptions, name))
        choices = (given, configured, default_epochs(self.epochs))
        return next(epochs for epochs in choices if epochs is not None)

    def _train(self, stage: str, epochs: int) -> str:
        """Train with the config of a stage; return the last checkpoint."""
        config = self.folder / f'{stage}.py'
        checkpoint = self.folder / stage / f'epoch_{epochs}.pth'

        def work() -> dict:
            # No validation at the end, since the stage is tested right afterwards
            self.tools.train(stage, config, f'train_cfg.val_begin={epochs + 1}')
            return {}

        self.state.run(f'train {stage}', _content(config), work, files=(checkpoint, ),
                       clear=lambda: self.tools.begin(stage))
        return str(checkpoint)

    def _test(self, stage: str, config: Path, checkpoint: str, *inputs: str) -> dict:
        return self.state.run(
            f'test {stage}', (checkpoint, *inputs), lambda: dict(
                stage=stage, **choose_metrics(self.tools.test(stage, config, checkpoint))))

    def _measure(self, unpruned: List[str], pruned: List[str]) -> List[dict]:
        """Measure size and speed of all stages in turns."""
        configs = [self.baseline] * len(unpruned) + [self.pruned] * len(pruned)
        return self.state.run('measure', unpruned + pruned, lambda: dict(
            stages=measure_stages(configs, unpruned + pruned)))['stages']


def _content(config: Path) -> Dict[str, object]:
    """Read the settings of a config on which its training depends."""
    content = plain_content(Config.fromfile(config))
    return {name: value for name, value in content.items() if name not in LATER_SETTINGS}
