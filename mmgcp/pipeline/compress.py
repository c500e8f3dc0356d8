# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The whole way: train, sparsify, prune, distil, test each and compare."""
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from mmengine.config import Config

from mmgcp.analysis import count_complexity, measure_latency
from mmgcp.datasets import VOCInfo, check_voc, choose_splits
from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import load_strictly, read_checkpoint
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import build_detector, image_size, load_config

from .pictures import draw_detections
from .schedules import base_epochs, default_epochs
from .stage_configs import (
    baseline_config,
    distill_config,
    num_training_images,
    sparse_config,
    sparsity_hook,
)
from .tool_runner import ToolRunner

METRICS = dict(mAP50='AP50', mAP='mAP')


@dataclass
class CompressOptions:
    """What to do.

    Attributes:
        config (str): Config of the detector, a file or as ``mmyolo::…``.
        work_dir (Path): Where everything is written.
        tools_dir (Path): Where train.py, test.py and prune.py are.
        checkpoint (str, optional): A trained detector, a file or a URL; without it the first
            stage trains.
        data (str, optional): A folder in VOC's layout to use instead of the config's data.
        target_params (float, optional): Share of the parameters to keep.
        target_flops (float, optional): Share of the MACs to keep.
        epochs (int, optional): Epochs of the first stage. Defaults to the config's.
        sparse_epochs (int, optional): Epochs of sparse training. Defaults to the config's
            ``sparse_epochs``, or a sixth of the first stage's, but at least 50 and at most all.
        distill_epochs (int, optional): Epochs of distilling. Defaults to the config's
            ``distill_epochs``, or likewise.
        lr (float, optional): Learning rate of the first stage. Defaults to the config's.
        sparse_lr (float, optional): That of sparse training. Defaults to the first stage's.
        distill_lr (float, optional): That of distilling. Likewise.
        sparsity_rate (float, optional): Rate of the sparsity penalty. Defaults to the
            config's ``sparsity_rate``, or 1e-3, and 2e-2 for the proximal penalty.
        sparsity_penalty (str, optional): 'subgradient' or 'proximal'. Defaults to 'proximal'
            for optimizers of the Adam kind, and to 'subgradient' for others.
        sparsity_schedule (str): Schedule of the rate. Defaults to 'two_phase'.
        prune_options (str): More arguments for prune.py, as in a shell. Defaults to none.
        cfg_options (dict): More settings of the config to override. Defaults to none.
    """
    config: str
    work_dir: Path
    tools_dir: Path
    checkpoint: Optional[str] = None
    data: Optional[str] = None
    target_params: Optional[float] = None
    target_flops: Optional[float] = None
    epochs: Optional[int] = None
    sparse_epochs: Optional[int] = None
    distill_epochs: Optional[int] = None
    lr: Optional[float] = None
    sparse_lr: Optional[float] = None
    distill_lr: Optional[float] = None
    sparsity_rate: Optional[float] = None
    sparsity_penalty: Optional[str] = None
    sparsity_schedule: str = 'two_phase'
    prune_options: str = ''
    cfg_options: Dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        for name in ('epochs', 'sparse_epochs', 'distill_epochs', 'lr', 'sparse_lr', 'distill_lr'):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f'--{name.replace("_", "-")} must be positive, but is {value}')


class State:
    """What is finished, kept in a file so that a new start goes on from there.

    A step is finished if it was run with the same inputs, itself and all before it.

    Args:
        path (Path): The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.steps = json.loads(path.read_text()) if path.exists() else {}
        self.history = hashlib.sha256()
        self.entered: List[str] = []

    def enter(self, step: str, *inputs: object) -> bool:
        """Begin a step; tells if its inputs are those of the last start.

        If they are not, it and all steps after it count as not done.
        """
        self.history.update(repr((step, inputs)).encode())
        record = self.steps.get(step, {})
        same = record.get('inputs') == self.history.hexdigest()
        if not same:
            self.begin_anew(step)
        self.entered.append(step)
        return same

    def begin_anew(self, step: str) -> None:
        """Let the step that was just entered and all after it count as not done."""
        self.steps = {name: self.steps[name] for name in self.entered if name != step}
        self._write(step, dict(inputs=self.history.hexdigest()))

    def result(self, step: str) -> Optional[dict]:
        """What the step led to, or None if it is not finished."""
        return self.steps.get(step, {}).get('result')

    def finish(self, step: str, result: dict) -> None:
        """Remember what a step led to."""
        self._write(step, dict(self.steps[step], result=result))

    def _write(self, step: str, record: dict) -> None:
        self.steps[step] = record
        with replacing(self.path) as (temporary, ):
            temporary.write_text(json.dumps(self.steps, indent=2))


def compress(options: CompressOptions) -> List[dict]:
    """Run all stages, or those that are not finished yet, and write the summary.

    ``work_dir`` gets the config of each stage (baseline.py, sparse.py, pruned/pruned.py,
    distilled.py), its checkpoints and log, ``summary.json``, ``summary.md`` and
    ``detections.png``.

    Args:
        options (CompressOptions): What to do.

    Returns:
        list[dict]: For each stage, baseline first, its name, mAP50, mAP, parameters,
        macs (for one image) and latency_ms.

    Raises:
        UserError: The input cannot be used, or a stage failed.
    """
    return _Pipeline(options).run()


class _Pipeline:

    def __init__(self, options: CompressOptions):
        self.options = options
        self.cfg = load_config(options.config, options.cfg_options)
        self.folder = options.work_dir.resolve()
        self.tools = ToolRunner(options.tools_dir, self.folder)
        self.prune_arguments = self._prune_arguments()
        self.voc: Optional[VOCInfo] = check_voc(options.data) if options.data else None
        self.checkpoint = self._given_checkpoint()
        self.epochs = options.epochs or base_epochs(self.cfg)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.baseline = self.folder / 'baseline.py'
        self.baseline.write_text(self._baseline_config())
        if self.checkpoint:
            self._check_checkpoint()
        self.state = State(self.folder / 'state.json')

    def run(self) -> List[dict]:
        pruned = self.folder / 'pruned' / 'pruned.py'
        trained = self._train_baseline()
        rows = [self._test('baseline', self.baseline, trained)]
        sparse = self._train_sparse(trained)
        rows.append(self._test('sparse', self.baseline, sparse))
        self._prune(sparse, pruned)
        rows.append(self._test('pruned', pruned, str(pruned.with_suffix('.pth'))))
        distilled = self._distill(trained)
        rows.append(self._test('distilled', pruned, distilled))
        # One after another, as the speed of a machine changes with what else it does
        rows = [self._measure(row, config) for row, config in zip(
            rows, (self.baseline, self.baseline, pruned, pruned))]
        draw_detections([('baseline', self.baseline, trained), ('distilled', pruned, distilled)],
                        self.folder / 'detections.png')
        self._write_summary(rows)
        return rows

    def _prune_arguments(self) -> List[str]:
        """Those for prune.py, which must not fail on them after hours of training."""
        arguments = shlex.split(self.options.prune_options)
        for name in ('target_params', 'target_flops'):
            value = getattr(self.options, name)
            if value is not None:
                arguments += [f'--{name.replace("_", "-")}', str(value)]
        parsed = self.tools.parse('prune.py', self.options.config, 'checkpoint', *arguments)
        if parsed.dry_run or parsed.work_dir:
            raise UserError('--prune-options must not have --dry-run or --work-dir')
        amounts = (parsed.target_params, parsed.target_flops, parsed.ratio, parsed.plan)
        if all(amount is None for amount in amounts) and 'prune_cfg' not in self.cfg:
            raise UserError(f'the config {self.options.config} has no prune_cfg: say how much to '
                            'prune with --target-params or --target-flops')
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
        read_checkpoint(self.checkpoint)
        try:
            load_strictly(model, self.checkpoint, str(self.baseline))
        except UserError as error:
            raise UserError(
                f'{error}. To train from the weights that fit, as for other classes, do not give '
                f'the checkpoint behind the config, but as --cfg-options '
                f'load_from={self.options.checkpoint}') from None

    def _baseline_config(self) -> str:
        return baseline_config(self.options.config, self.cfg, self.epochs, self.voc,
                               self.options.cfg_options, self.options.lr, self._train_list())

    def _train_list(self) -> Optional[str]:
        """Join the training sets if there are several: the hooks that end mosaic need one."""
        splits = choose_splits(self.voc)[0] if self.voc else []
        if len(splits) < 2:
            return None
        folder = self.voc.root / 'ImageSets' / 'Main'
        lines = [line for split in splits
                 for line in (folder / f'{split}.txt').read_text().splitlines() if line.strip()]
        path = self.folder / 'trainval.txt'
        path.write_text('\n'.join(dict.fromkeys(lines)) + '\n')
        return str(path)

    def _train_baseline(self) -> str:
        if self.checkpoint:
            self.state.enter('baseline', self.baseline.read_text(), self.checkpoint)
            return self.checkpoint
        return self._train('baseline', self.baseline, self.epochs)

    def _epochs(self, stage: str) -> int:
        """Those of a later stage."""
        name = f'{stage}_epochs'
        return (getattr(self.options, name) or self.cfg.get(name)
                or default_epochs(self.epochs))

    def _train_sparse(self, trained: str) -> str:
        epochs, options = self._epochs('sparse'), self.options
        cfg = Config.fromfile(self.baseline)
        hook = sparsity_hook(cfg, options.sparsity_rate, options.sparsity_penalty,
                             options.sparsity_schedule)
        config = self.folder / 'sparse.py'
        config.write_text(sparse_config(cfg, trained, epochs, hook, options.sparse_lr,
                                        num_training_images(self.voc)))
        return self._train('sparse', config, epochs)

    def _prune(self, sparse: str, pruned: Path) -> None:
        same = self.state.enter('prune', self.prune_arguments, self.cfg.get('prune_cfg', {}))
        if same and self.state.result('prune'):
            if pruned.exists() and pruned.with_suffix('.pth').exists():
                return
            self.state.begin_anew('prune')
        self.tools.run('prune', 'prune.py', str(self.baseline), sparse, *self.prune_arguments,
                       '--work-dir', str(pruned.parent))
        self.state.finish('prune', dict(done=True))

    def _distill(self, trained: str) -> str:
        epochs = self._epochs('distill')
        config = self.folder / 'distilled.py'
        config.write_text(distill_config(Config.fromfile(self.baseline), str(self.baseline),
                                         trained, epochs, self.options.distill_lr,
                                         num_training_images(self.voc)))
        return self._train('distilled', config, epochs)

    def _train(self, stage: str, config: Path, epochs: int) -> str:
        """Train a stage, resuming if it was interrupted, and return its last checkpoint."""
        folder = self.folder / stage
        same = self.state.enter(f'train {stage}', config.read_text())
        checkpoint = folder / f'epoch_{epochs}.pth'
        if same and self.state.result(f'train {stage}'):
            if checkpoint.exists():
                return str(checkpoint)
            self.state.begin_anew(f'train {stage}')
        marker = folder / 'last_checkpoint'
        if not same and marker.exists():
            marker.unlink()  # of a run with other settings
        # The stage is tested right after, which would repeat the validation at the end
        self.tools.run(stage, 'train.py', str(config), '--work-dir', str(folder),
                       *(['--resume'] if marker.exists() else []),
                       '--cfg-options', f'train_cfg.val_begin={epochs + 1}')
        self.state.finish(f'train {stage}', dict(done=True))
        return str(checkpoint)

    def _test(self, stage: str, config: Path, checkpoint: str) -> dict:
        """Test a stage."""
        same = self.state.enter(f'test {stage}', config.read_text(), checkpoint)
        row = self.state.result(f'test {stage}')
        if same and row:
            return row
        metrics = self.tools.test(stage, config, checkpoint)
        row = dict(stage=stage, **{name: _metric(metrics, key) for name, key in METRICS.items()})
        self.state.finish(f'test {stage}', row)
        return row

    def _measure(self, row: dict, config: Path) -> dict:
        """Add size and speed to what a test led to."""
        step = f'measure {row["stage"]}'
        same = self.state.enter(step, config.read_text())
        sizes = self.state.result(step)
        if not (same and sizes):
            sizes = dict(zip(('parameters', 'macs', 'latency_ms'), _size_and_speed(config)))
            self.state.finish(step, sizes)
        return {**row, **sizes}

    def _write_summary(self, rows: List[dict]) -> None:
        table = format_table(rows)
        with replacing(self.folder / 'summary.json', self.folder / 'summary.md') as paths:
            paths[0].write_text(json.dumps(dict(stages=rows), indent=2) + '\n')
            paths[1].write_text(table + '\n\n![detections](detections.png)\n')


def format_table(rows: List[dict]) -> str:
    """Return the stages as a table in Markdown, with the changes from the first one."""
    first = rows[0]
    lines = ['| stage     | mAP50 |   mAP | parameters       | MACs             | latency  |',
             '|:----------|------:|------:|-----------------:|-----------------:|---------:|']
    for row in rows:
        sizes = [f'{row[name] / scale:.3f} {unit} {row[name] / first[name] - 1:+6.1%}'
                 for name, scale, unit in (('parameters', 1e6, 'M'), ('macs', 1e9, 'G'))]
        lines.append(f'| {row["stage"]:<9} | {row["mAP50"]:.3f} | {row["mAP"]:.3f} '
                     f'| {sizes[0]:>16} | {sizes[1]:>16} | {row["latency_ms"]:>5.1f} ms |')
    return '\n'.join(lines)


def _metric(metrics: Dict[str, float], name: str) -> float:
    for key, value in metrics.items():
        if key.split('/')[-1] == name:
            return value
    # COCO's metric names the IoU threshold of 0.5 otherwise
    for key, value in metrics.items():
        if key.split('/')[-1] == dict(AP50='bbox_mAP_50', mAP='bbox_mAP')[name]:
            return value
    raise UserError(f'the test reports no {name}, but {sorted(metrics)}')


def _size_and_speed(config: Path) -> Tuple[int, int, float]:
    cfg = load_config(str(config))
    model = build_detector(cfg)
    width, height = image_size(cfg)
    params, macs = count_complexity(model, (3, height, width))
    return params, macs, round(measure_latency(model, (3, height, width)), 2)
