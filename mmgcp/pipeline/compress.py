# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""All stages: train, sparsify, prune, distil; each is tested, and all are compared."""
import copy
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, check_voc, choose_splits
from mmgcp.errors import UserError
from mmgcp.pruning.options import KEEP_SHARE
from mmgcp.utils.checkpoint import load_strictly, read_checkpoint
from mmgcp.utils.cli import CfgOptions, replacing
from mmgcp.utils.config import build_detector, load_config
from mmgcp.utils.devices import find_device
from mmgcp.utils.folders import work_dir
from mmgcp.utils.options import check_options, number_in, option

from .child_config import write_child
from .pictures import draw_detections
from .schedules import base_epochs, default_epochs
from .stage_configs import baseline_config, distill_config, sparse_config, sparsity_hook
from .state import State
from .summary import choose_metrics, measure_detector, write_summary
from .tool_runner import ToolRunner
from .voc_data import num_training_images

# Settings of the user's config that the training of the baseline does not depend on
LATER_SETTINGS = ('sparse_epochs', 'sparsity_rate', 'prune_cfg', 'distill_epochs',
                  'attention_groups')

POSITIVE = number_in(0, math.inf, 'must be positive', open_low=True)
TRAINING, SPARSITY, PRUNING = 'training', 'sparsity', 'pruning'


@dataclass
class CompressOptions:
    """Options of :func:`compress`.

    Raises:
        UserError: A value is not allowed.
    """
    config: str = option(help='config of the detector, a file or as ``mmyolo::…``')
    work_dir: Path = option(help='where everything is written')
    tools_dir: Path = option(help='folder with train.py, test.py and prune.py')
    checkpoint: Optional[str] = option(
        None, help='the trained detector, a file or a URL', default_help='train it')
    data: Optional[str] = option(
        None, cli={}, default_help="the config's",
        help="folder in PASCAL VOC's layout (JPEGImages, Annotations, ImageSets/Main) that takes "
        "the place of the config's data")
    epochs: Optional[int] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=int), default_help="the config's",
        help='epochs of the first stage')
    sparse_epochs: Optional[int] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=int),
        default_help="the config's sparse_epochs, or a sixth of the first stage's, but at least "
        '50 and at most all', help='epochs of sparse training')
    distill_epochs: Optional[int] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=int),
        default_help="the config's distill_epochs, or as for sparse training",
        help='epochs of distillation')
    lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float), default_help="the config's",
        help='learning rate of the first stage; absolute rates of the schedulers are scaled '
        'with it')
    sparse_lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float),
        default_help="the first stage's", help='learning rate of sparse training')
    distill_lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float),
        default_help="the first stage's", help='learning rate of distillation')
    sparsity_rate: Optional[float] = option(
        None, cli=dict(group=SPARSITY, type=float),
        default_help="the config's sparsity_rate, or 1e-3 for the subgradient and 2e-2 for the "
        'proximal penalty', help='factor of the sparsity penalty')
    sparsity_penalty: Optional[str] = option(
        None, cli=dict(group=SPARSITY, choices=('subgradient', 'proximal')),
        default_help='proximal for Adam and its variants, subgradient for other optimizers',
        help='how the penalty is applied, subgradient or proximal')
    sparsity_schedule: str = option(
        'two_phase', cli=dict(group=SPARSITY), help='type of the schedule of the sparsity rate')
    target_params: Optional[float] = option(
        None, check=KEEP_SHARE, cli=dict(group=PRUNING, type=float),
        default_help="the config's prune_cfg", help='share of the parameters to keep')
    target_flops: Optional[float] = option(
        None, check=KEEP_SHARE, cli=dict(group=PRUNING, type=float),
        default_help="the config's prune_cfg", help='share of the MACs to keep')
    prune_options: str = option(
        '', cli=dict(group=PRUNING, metavar="'OPTIONS'"), default_help='none',
        help="more options of prune.py, as in --prune-options='--round-to 8 --sensitivity'")
    cfg_options: Dict[str, object] = option(
        factory=dict, cli=dict(nargs='+', action=CfgOptions), default_help='none',
        help='settings of the config to override, as key=value')

    def __post_init__(self):
        check_options(self)


def compress(options: CompressOptions) -> List[dict]:
    """Run all stages, except those that an earlier run has finished, and write the summary.

    ``work_dir`` gets the config of each stage (baseline.py, sparse.py, pruned/pruned.py,
    distilled.py), its checkpoints and log, ``summary.json``, ``summary.md`` and
    ``detections.png``.

    Args:
        options (CompressOptions): What to do.

    Returns:
        list[dict]: For each stage, baseline first: its ``stage``, ``mAP50``, ``mAP``,
        ``parameters``, ``macs`` (for one image) and ``latency_ms``.

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
        self.folder = options.work_dir.resolve()
        self.tools = ToolRunner(options.tools_dir, self.folder)
        self.prune_arguments = self._prune_arguments()
        self.voc: Optional[VOCInfo] = check_voc(options.data) if options.data else None
        self.checkpoint = self._given_checkpoint()
        self.epochs = options.epochs or base_epochs(self.cfg)
        self.baseline = self.folder / 'baseline.py'
        self.pruned = self.folder / 'pruned' / 'pruned.py'
        self._write_baseline_config()
        if self.checkpoint:
            self._check_checkpoint()
        self.state = State(self.folder / 'state.json')

    def run(self) -> List[dict]:
        trained = self._train_baseline()
        rows = [self._test('baseline', self.baseline, trained)]
        sparse = self._train_sparse(trained)
        rows.append(self._test('sparse', self.baseline, sparse))
        self._prune(sparse)
        rows.append(self._test('pruned', self.pruned, str(self.pruned.with_suffix('.pth')),
                               self.pruned.read_text()))  # which may also be pruned by hand
        distilled = self._distill(trained)
        rows.append(self._test('distilled', self.pruned, distilled))
        # In direct succession, because the speed of a machine depends on what else it does
        configs = (self.baseline, self.baseline, self.pruned, self.pruned)
        rows = [self._measure(row, config) for row, config in zip(rows, configs)]
        write_summary(rows, self.folder)
        try:
            draw_detections([('baseline', self.baseline, trained),
                             ('distilled', self.pruned, distilled)],
                            self.folder / 'detections.png')
        except Exception as error:  # a picture ends nothing
            print(f'warning: there is no picture of detections: {type(error).__name__}: {error}')
        return rows

    def _prune_arguments(self) -> List[str]:
        """Return the arguments for prune.py, checked now and not after hours of training."""
        arguments = shlex.split(self.options.prune_options)
        for name in ('target_params', 'target_flops'):
            value = getattr(self.options, name)
            if value is not None:
                arguments += [f'--{name.replace("_", "-")}', str(value)]
        parsed = self.tools.parse('prune.py', self.options.config, 'checkpoint', *arguments)
        if parsed.dry_run or parsed.work_dir or parsed.launcher != 'none':
            raise UserError('--prune-options must not have --dry-run, --work-dir or --launcher')
        find_device(parsed.device)
        amounts = (parsed.target_params, parsed.target_flops, parsed.ratio, parsed.plan)
        if all(amount is None for amount in amounts) and 'prune_cfg' not in self.cfg:
            raise UserError(f'the config {self.options.config} has no prune_cfg: say how much to '
                            'prune with --target-params or --target-flops')
        if not (parsed.criterion or parsed.plan or self.cfg.get('prune_cfg', {}).get('criterion')):
            arguments += ['--criterion', 'BNScale']  # which sparse training is made for
        return arguments

    def _given_checkpoint(self) -> Optional[str]:
        checkpoint = self.options.checkpoint
        if not checkpoint or '://' in checkpoint:
            return checkpoint
        if not Path(checkpoint).is_file():
            raise UserError(f'there is no checkpoint {checkpoint}')
        return str(Path(checkpoint).resolve())

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

    def _write_baseline_config(self) -> None:
        config, options = self.options.config, self.options
        write_child(
            self.baseline, config if '::' in config else str(Path(config).resolve()),
            lambda cfg: baseline_config(cfg, self.epochs, self.voc, options.cfg_options,
                                        options.lr, self._train_list()))

    def _train_list(self) -> Optional[str]:
        """Join several training splits: the hooks that turn off mosaic need a single data set."""
        splits = choose_splits(self.voc)[0] if self.voc else []
        if len(splits) < 2:
            return None
        folder = self.voc.root / 'ImageSets' / 'Main'
        lines = [line for split in splits
                 for line in (folder / f'{split}.txt').read_text().splitlines() if line.strip()]
        path = self.folder / 'trainval.txt'
        with replacing(path) as (temporary, ):
            temporary.write_text('\n'.join(dict.fromkeys(lines)) + '\n')
        return str(path)

    def _train_baseline(self) -> str:
        if not self.checkpoint:
            return self._train('baseline', self.epochs)
        self.state.run('baseline', (_content(self.baseline), self.checkpoint), dict)
        return self.checkpoint

    def _train_sparse(self, trained: str) -> str:
        epochs, options = self._epochs('sparse'), self.options
        hook = sparsity_hook(Config.fromfile(self.baseline), options.sparsity_rate,
                             options.sparsity_penalty, options.sparsity_schedule)
        write_child(
            self.folder / 'sparse.py', './baseline.py',
            lambda cfg: sparse_config(cfg, trained, epochs, hook, options.sparse_lr,
                                      num_training_images(self.voc)))
        return self._train('sparse', epochs)

    def _prune(self, sparse: str) -> None:

        def work() -> dict:
            self.tools.run('prune', 'prune.py', str(self.baseline), sparse, *self.prune_arguments,
                           '--work-dir', str(self.pruned.parent))
            return {}

        self.state.run('prune', (self.prune_arguments, self.cfg.get('prune_cfg')), work,
                       files=(self.pruned, self.pruned.with_suffix('.pth')))

    def _distill(self, trained: str) -> str:
        epochs = self._epochs('distill')
        # Those in pruned.py may be older
        groups = Config.fromfile(self.baseline).get('attention_groups', 'auto')
        write_child(
            self.folder / 'distilled.py', './pruned/pruned.py',
            lambda cfg: distill_config(cfg, str(self.baseline), trained, epochs, groups,
                                       self.options.distill_lr, num_training_images(self.voc)))
        return self._train('distilled', epochs)

    def _epochs(self, stage: str) -> int:
        """Return the number of epochs of a later stage."""
        name = f'{stage}_epochs'
        return (getattr(self.options, name) or self.cfg.get(name)
                or default_epochs(self.epochs))

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

    def _measure(self, row: dict, config: Path) -> dict:
        """Add size and speed to the result of a test."""
        return {**row, **self.state.run(f'measure {row["stage"]}', None,
                                        lambda: measure_detector(config))}


def _content(config: Path) -> Dict[str, object]:
    """Read the settings of a config on which its training depends."""
    content = Config.fromfile(config).to_dict()
    return {name: value for name, value in content.items() if name not in LATER_SETTINGS}
