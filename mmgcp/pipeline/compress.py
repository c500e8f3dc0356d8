# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The whole way: train, sparsify, prune, distil, test each and compare."""
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from mmengine.config import Config

from mmgcp.analysis import count_complexity, measure_latency
from mmgcp.datasets import VOCInfo, check_voc
from mmgcp.utils import UserError
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import build_detector, image_size, load_config

from .pictures import draw_detections
from .stage_configs import baseline_config, distill_config, sparse_config
from .tool_runner import ToolRunner

METRICS = dict(mAP50='AP50', mAP='mAP')


@dataclass
class CompressOptions:
    """What to do.

    Attributes:
        config (str): Config of the detector, a file or as ``mmyolo::…``.
        work_dir (Path): Where everything is written.
        tools_dir (Path): Where train.py, test.py and prune.py are.
        checkpoint (str, optional): A trained detector; without it the first stage trains.
        data (str, optional): A folder in VOC's layout to use instead of the config's data.
        target_params (float, optional): Share of the parameters to keep.
        target_flops (float, optional): Share of the operations to keep.
        epochs (int, optional): Epochs of the first stage. Defaults to the config's.
        sparse_epochs (int, optional): Epochs of sparse training. Defaults to the config's
            ``sparse_epochs``, or those of the first stage.
        distill_epochs (int, optional): Epochs of distilling. Likewise.
        sparsity_rate (float, optional): Rate of the sparsity penalty. Defaults to the
            config's ``sparsity_rate``, or 1e-3.
        sparsity_schedule (str): Schedule of that rate.
        cfg_options (dict): More settings of the config to override.
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
    sparsity_rate: Optional[float] = None
    sparsity_schedule: str = 'two_phase'
    cfg_options: Dict[str, object] = field(default_factory=dict)


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
        if options.target_params is None and options.target_flops is None and (
                'prune_cfg' not in self.cfg):
            raise UserError(f'the config {options.config} has no prune_cfg: say how much to prune '
                            'with --target-params or --target-flops')
        self.voc: Optional[VOCInfo] = check_voc(options.data) if options.data else None
        if options.checkpoint:
            self._check_checkpoint()
        self.epochs = options.epochs or self.cfg.train_cfg.max_epochs
        self.folder = options.work_dir.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = State(self.folder / 'state.json')
        self.tools = ToolRunner(options.tools_dir, self.folder)

    def run(self) -> List[dict]:
        baseline = self.folder / 'baseline.py'
        pruned = self.folder / 'pruned' / 'pruned.py'
        trained = self._train_baseline(baseline)
        sparse = self._train_sparse(baseline, trained)
        self._prune(baseline, sparse)
        distilled = self._distill(baseline, trained)
        stages = [('baseline', baseline, trained), ('sparse', baseline, sparse),
                  ('pruned', pruned, pruned.with_suffix('.pth')),
                  ('distilled', pruned, distilled)]
        rows = [self._evaluate(*stage) for stage in stages]
        draw_detections([stages[0], stages[-1]], self.folder / 'detections.png')
        self._write_summary(rows)
        return rows

    def _check_checkpoint(self) -> None:
        if self.voc is None:
            load_strictly(build_detector(self.cfg), self.options.checkpoint, self.options.config)
        elif not Path(self.options.checkpoint).is_file():
            raise UserError(f'there is no checkpoint {self.options.checkpoint}')

    def _train_baseline(self, config: Path) -> Path:
        config.write_text(baseline_config(self.options.config, self.cfg, self.epochs, self.voc,
                                          self.options.cfg_options))
        if self.options.checkpoint:
            checkpoint = Path(self.options.checkpoint).resolve()
            self.state.enter('baseline', config.read_text(), str(checkpoint))
            load_strictly(build_detector(load_config(str(config))), str(checkpoint), str(config))
            return checkpoint
        return self._train('baseline', config, self.epochs)

    def _train_sparse(self, baseline: Path, trained: Path) -> Path:
        epochs = self.options.sparse_epochs or self.cfg.get('sparse_epochs', self.epochs)
        config = self.folder / 'sparse.py'
        config.write_text(sparse_config(Config.fromfile(baseline), trained, epochs,
                                        self._sparsity_rate(),
                                        self.options.sparsity_schedule))
        return self._train('sparse', config, epochs)

    def _sparsity_rate(self) -> float:
        if self.options.sparsity_rate is not None:
            return self.options.sparsity_rate
        return self.cfg.get('sparsity_rate', 1e-3)

    def _prune(self, baseline: Path, sparse: Path) -> None:
        options = []
        for name in ('target_params', 'target_flops'):
            value = getattr(self.options, name)
            if value is not None:
                options += [f'--{name.replace("_", "-")}', str(value)]
        same = self.state.enter('prune', options, self.cfg.get('prune_cfg', {}))
        if same and self.state.result('prune'):
            return
        self.tools.run('prune', 'prune.py', str(baseline), str(sparse), '--work-dir',
                       str(self.folder / 'pruned'), *options)
        self.state.finish('prune', dict(done=True))

    def _distill(self, baseline: Path, trained: Path) -> Path:
        epochs = self.options.distill_epochs or self.cfg.get('distill_epochs', self.epochs)
        config = self.folder / 'distilled.py'
        config.write_text(
            distill_config(Config.fromfile(baseline), baseline, trained, epochs))
        return self._train('distilled', config, epochs)

    def _train(self, stage: str, config: Path, epochs: int) -> Path:
        """Train a stage, resuming if it was interrupted, and return its last checkpoint."""
        folder = self.folder / stage
        same = self.state.enter(f'train {stage}', config.read_text())
        checkpoint = folder / f'epoch_{epochs}.pth'
        if same and self.state.result(f'train {stage}'):
            if checkpoint.exists():
                return checkpoint
            self.state.begin_anew(f'train {stage}')
        marker = folder / 'last_checkpoint'
        if not same and marker.exists():
            marker.unlink()  # of a run with other settings
        self.tools.run(stage, 'train.py', str(config), '--work-dir', str(folder),
                       *(['--resume'] if marker.exists() else []))
        self.state.finish(f'train {stage}', dict(done=True))
        return checkpoint

    def _evaluate(self, stage: str, config: Path, checkpoint: Path) -> dict:
        """Test a stage and measure its size and speed."""
        same = self.state.enter(f'test {stage}', config.read_text(), str(checkpoint))
        row = self.state.result(f'test {stage}')
        if same and row:
            return row
        metrics = self.tools.test(stage, config, checkpoint)
        row = dict(stage=stage, **{name: _metric(metrics, key) for name, key in METRICS.items()})
        row.update(zip(('parameters', 'macs', 'latency_ms'), _size_and_speed(config)))
        self.state.finish(f'test {stage}', row)
        return row

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
