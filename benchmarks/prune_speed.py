# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Time and peak memory of pruning, side by side with Torch-Pruning's own pruner.

Measured are, on the same detector with random weights:

- mmgcp: ``mmgcp.pruning.prune`` without compensation, and again with it: trace, score, plan,
  remove, check. The layer groups are the config's, otherwise the automatic ones. Compensation
  folds constants, or with ``--images`` reconstructs layers on so many images of noise.
- Torch-Pruning: constructor and ``step()`` of its ``BasePruner`` with ``BNScaleImportance``, or
  with ``MagnitudeImportance`` where that crashes; the prediction layers are ignored, gradients
  are on in all layers, and the example image has the size that mmgcp traces with.

Both remove the same ratio of channels. Every measurement is a process of its own, in which
everything is imported and a small convolution has run before; the variants take turns. Times
are medians, and the ratio is the median of those of neighbouring runs.

Memory is the peak of the resident memory during pruning, less the resident memory before the
model was built, as a multiple of the bytes of the model's parameters: 1 is the model itself.
Afterwards, and not measured, the pruned network computes predictions and a loss; where it
cannot, a note below the table says so.
"""
import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.config import Config

from mmgcp.deployment.timing import cpu_name
from mmgcp.errors import UserError
from mmgcp.nn.forward import random_image, run_as_tensors, working_shape
from mmgcp.nn.temporarily import eval_mode
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, image_size, load_config

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    'yolov4': str(ROOT / 'configs' / 'yolov4' / 'yolov4_fast_1xb64-50e_voc.py'),
    'yolov5-n': 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov5-s': 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov6-n': 'mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov7-tiny': 'mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'yolov7-l': 'mmyolo::yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py',
    'yolov8-n': 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    'yolov8-s': 'mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py',
    'yolox-tiny': 'mmyolo::yolox/yolox_tiny_fast_8xb8-300e_coco.py',
    'rtmdet-tiny': 'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
    'ppyoloe-plus-s': 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    'retinanet-r50': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
}
RATIO = 0.4
TIMEOUT = 900  # seconds that one measurement may take
WIDTH = 120  # of what is printed

# Variant -> how notes call it, in the order in which the variants take turns
VARIANTS = {'ours': 'mmgcp', 'torch_pruning': 'Torch-Pruning',
            'compensated': 'mmgcp with compensation'}
IMPORTANCES = ('BNScaleImportance', 'MagnitudeImportance')  # of Torch-Pruning, in this order
# Stage that prune() reports and whether it is done -> phase that begins there
PHASES = {
    ('tracing', False): 'trace',
    ('tracing', True): 'score',
    ('choosing channels', False): 'plan',
    ('choosing channels', True): 'plan',
    ('compensating', False): 'compensate',
    ('compensating', True): 'remove',
    ('removing channels', False): 'remove',
    ('removing channels', True): 'remove',
}
SHOWN_PHASES = ('trace', 'score', 'plan', 'remove')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='MODEL',
                        help=f'among {", ".join(MODELS)}, or config files; default: all of those')
    parser.add_argument('--repeats', type=int, default=3, help='runs of each variant')
    parser.add_argument('--threads', type=int, default=_num_cores(),
                        help='threads of PyTorch; default: one for each core')
    parser.add_argument('--images', type=int, default=0, metavar='N',
                        help='images to compensate with; default: none')
    parser.add_argument('--out', type=Path, help='JSON file for all figures')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.child:
        run_child(args.child)
        return
    if args.repeats < 1 or args.threads < 1:
        raise UserError('--repeats and --threads must be at least 1')
    if args.images < 0:
        raise UserError(f'--images must not be negative, but is {args.images}')
    if args.out and (args.out.is_dir() or not args.out.resolve().parent.is_dir()):
        raise UserError(f'--out {args.out} is a folder, or in a folder that does not exist')
    models = [measure_model(name, path, args) for name, path in find_configs(args.models)]
    report = dict(machine=describe_machine(args.threads), ratio=RATIO, repeats=args.repeats,
                  models=models)
    print_report(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + '\n')


def find_configs(models: Iterable[str]) -> List[Tuple[str, str]]:
    """Find names and configs of models, and check that the configs can be read."""
    configs = []
    for model in models:
        if model in MODELS:
            configs.append((model, MODELS[model]))
        elif '::' in model or os.path.isfile(model):
            configs.append((Path(model).stem, model))
        else:
            raise UserError(f'there is no model or config file {model}; the models are '
                            f'{", ".join(MODELS)}')
    for _, path in configs:
        load_config(path)
    return configs


# ---------------------------------------------------------------- the process that measures all
def measure_model(name: str, config: str, args: argparse.Namespace) -> dict:
    """Run all variants on a model in turns.

    Args:
        name (str): Name of the model.
        config (str): Its config.
        args (argparse.Namespace): Has ``repeats``, ``threads`` and ``images``.

    Returns:
        dict: What :func:`summarize_model` makes of the runs.
    """
    runs = {variant: [] for variant in VARIANTS}
    rejected: List[dict] = []  # runs with an importance of Torch-Pruning's that crashed
    for repeat in range(args.repeats):
        for variant in VARIANTS:
            if runs[variant] and 'seconds' not in runs[variant][-1]:
                continue  # it would fail again
            print(f'{name}: {VARIANTS[variant]}, run {repeat + 1} of {args.repeats}',
                  file=sys.stderr, flush=True)
            request = dict(config=config, variant=variant, threads=args.threads,
                           images=args.images)
            if variant == 'torch_pruning':
                run = _run_torch_pruning(request, runs['ours'][0], rejected)
            else:
                run = run_in_process(request)
            runs[variant].append(run)
    return summarize_model(name, config, runs, rejected)


def _run_torch_pruning(request: dict, ours: dict, rejected: List[dict]) -> dict:
    """Run Torch-Pruning with the first importance that does not crash."""
    if 'traced_shape' not in ours:
        return _failed('preparation', 'mmgcp has not told the prediction layers')
    request = dict(request, ignored=ours['predictions'], traced_shape=ours['traced_shape'])
    run = {}
    for importance in IMPORTANCES[len(rejected):]:
        run = dict(run_in_process(dict(request, importance=importance)), importance=importance)
        if 'seconds' in run:
            break
        if importance != IMPORTANCES[-1]:
            rejected.append(run)
    return run


def run_in_process(request: dict) -> dict:
    """Run a measurement in a process of its own; see :func:`run_child`."""
    command = [sys.executable, str(Path(__file__).resolve()), '--child', json.dumps(request)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, PYTHONWARNINGS='ignore'))
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return _failed('pruning', f'no result after {TIMEOUT} s')
    finally:  # also when interrupted
        process.kill()
        process.wait()
    if process.returncode or not output.strip():
        lines = errors.strip().splitlines() or ['']
        return _failed('process', f'status {process.returncode} {lines[-1]}'.strip())
    return json.loads(output.splitlines()[-1])


def _failed(stage: str, message: str) -> dict:
    return dict(failure=dict(stage=stage, message=message))


def summarize_model(name: str, config: str, runs: Dict[str, List[dict]],
                    rejected: Sequence[dict]) -> dict:
    """Reduce the runs on a model to medians.

    Args:
        name (str): Name of the model.
        config (str): Its config.
        runs (dict[str, list[dict]]): Runs by variant.
        rejected (Sequence[dict]): Runs of Torch-Pruning with an importance that crashed.

    Returns:
        dict: One entry of the report.
    """
    built = next((run for variant in runs.values() for run in variant if 'params' in run), {})
    measured = {variant: [run for run in runs[variant] if 'seconds' in run] for variant in runs}
    ratios = [theirs['seconds'] / ours['seconds']
              for ours, theirs in zip(measured['ours'], measured['torch_pruning'])]
    model = dict(
        model=name, config=config,
        **{key: built.get(key) for key in ('params', 'model_bytes', 'input_shape')},
        traced_shape=runs['ours'][0].get('traced_shape'),
        ratio=statistics.median(ratios) if ratios else None,
        variants={variant: _summarize_runs(runs[variant], measured[variant])
                  for variant in runs})
    model['variants']['torch_pruning']['rejected'] = [
        dict(run['failure'], importance=run['importance']) for run in rejected]
    return model


def _summarize_runs(runs: Sequence[dict], measured: Sequence[dict]) -> dict:
    failures = [run['failure'] for run in runs if run.get('failure')]
    summary = dict(seconds=None, phases={}, peak_multiple=None, params_left=None,
                   failure=failures[0] if failures else None, runs=list(runs))
    if measured:
        phases = measured[0]['phases']
        summary.update(
            seconds=_median(measured, lambda run: run['seconds']),
            phases={phase: _median(measured, lambda run, phase=phase: run['phases'][phase])
                    for phase in phases},
            peak_multiple=_median(measured, lambda run: run['peak_bytes'] / run['model_bytes']),
            params_left=measured[0]['params_left'])
    return summary


def _median(runs: Iterable[dict], get: Callable[[dict], float]) -> float:
    return statistics.median(get(run) for run in runs)


# ---------------------------------------------------------------- the process of one measurement
def run_child(request: dict) -> None:
    """Measure one variant on one model once, and print the figures as a line of JSON.

    Args:
        request (dict): ``config``, ``variant``, ``threads`` and ``images``; for Torch-Pruning
            also the name of its ``importance``, the names of the layers that are ``ignored``, and
            the ``traced_shape``.
    """
    with contextlib.redirect_stdout(sys.stderr):
        figures = _measure(request)
    print(json.dumps(figures))


def _measure(request: dict) -> dict:
    torch.set_num_threads(request['threads'])
    for package in ('mmdet.models', 'mmyolo.models', 'mmgcp.models', 'mmgcp.pruning',
                    'torch_pruning'):
        importlib.import_module(package)
    cfg = load_config(request['config'])
    _warm_up()
    gc.collect()
    before = _memory('VmRSS')
    model = _build(cfg)
    gc.collect()
    params = list(model.parameters())
    figures = dict(
        params=_num_params(model),
        model_bytes=sum(param.numel() * param.element_size() for param in params),
        input_shape=[3, *reversed(image_size(cfg))],
        peak_reset=_reset_peak())
    del params
    prune = _prune_with_torch_pruning if request['variant'] == 'torch_pruning' else _prune_with_ours
    clock = PhaseClock()
    stage = 'pruning'
    try:
        result = prune(model, cfg, request, clock)
        clock.stop()
        figures.update(peak_bytes=_memory('VmHWM') - before, seconds=sum(clock.seconds.values()),
                       cpu_seconds=clock.cpu_seconds, other_cores=clock.other_cores,
                       phases=clock.seconds, params_left=_num_params(model), **result)
        stage = 'shape'
        shape = request.get('traced_shape') or working_shape(model, figures['input_shape'])
        figures['traced_shape'] = list(shape)
        stage = 'forward'
        _compute_predictions(model, shape)
        stage = 'loss'
        _compute_loss(model, shape)
    except Exception as error:  # whatever the model or a pruner raises is a result
        stage = clock.phase if stage == 'pruning' else stage
        first_line = (str(error).strip().splitlines() or [''])[0]
        figures.update(_failed(stage, f'{type(error).__name__}: {first_line}'))
    return figures


class PhaseClock:
    """Measures the phases of something.

    Attributes:
        phase (str): The present phase.
        seconds (dict[str, float]): Time of each phase.
        cpu_seconds (float): Time of all phases on all cores.
    """

    def __init__(self):
        self.phase = ''
        self.seconds: Dict[str, float] = {}
        self.cpu_seconds = 0.
        self._busy_seconds: Optional[float] = 0.
        self._since: Tuple[float, float, Optional[float]] = (0., 0., None)

    @property
    def other_cores(self) -> Optional[float]:
        """Cores that other processes used meanwhile, on average; None if that is unknown."""
        if self._busy_seconds is None:
            return None
        return max(0., self._busy_seconds - self.cpu_seconds) / sum(self.seconds.values())

    def enter(self, phase: str) -> None:
        """End the present phase, if any, and begin one."""
        self.stop()
        self.phase = phase
        self.seconds.setdefault(phase, 0.)
        self._since = (time.perf_counter(), time.process_time(), _busy_seconds())

    def stop(self) -> None:
        """End the present phase."""
        if self.phase:
            seconds, cpu_seconds, busy = self._since
            self.seconds[self.phase] += time.perf_counter() - seconds
            self.cpu_seconds += time.process_time() - cpu_seconds
            self._busy_seconds = None if busy is None else self._busy_seconds + (
                _busy_seconds() - busy)
        self.phase = ''


def _busy_seconds() -> Optional[float]:
    """Time that all cores have been busy since the machine started; None if that is unknown."""
    try:
        user, nice, system, _, _, *others = Path('/proc/stat').read_text().split()[1:9]
    except (OSError, ValueError):
        return None
    return sum(map(int, (user, nice, system, *others))) / os.sysconf('SC_CLK_TCK')


def _prune_with_ours(model: nn.Module, cfg: Config, request: dict, clock: PhaseClock) -> dict:
    from mmgcp.pruning import prune
    from mmgcp.pruning.graph import PREDICTIONS
    groups = cfg.get('prune_cfg', {}).get('groups', 'auto')

    def progress(stage: str, done: int, steps: int) -> None:
        clock.enter(PHASES.get((stage, done == steps), stage))

    shape = (3, *reversed(image_size(cfg)))
    clock.enter('trace')
    result = prune(model, groups=groups, ratio=RATIO, input_shape=shape,
                   compensate=request['variant'] == 'compensated',
                   calibration=_Noise(request['images'], shape) if request['images'] else None,
                   progress=progress)
    return dict(predictions=[name for name, reason in result.plan.skipped.items()
                             if reason == PREDICTIONS])


class _Noise:
    """Batches of at most eight images of noise, with larger and smaller structures."""

    def __init__(self, number: int, shape: Sequence[int]):
        self.number, self.shape = number, shape

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.number, 8):
            count = min(8, self.number - first)
            coarse = torch.rand(count, self.shape[0], 20, 20, generator=generator)
            fine = torch.rand(count, *self.shape, generator=generator)
            yield (nn.functional.interpolate(coarse, self.shape[1:]) + fine) / 2


def _prune_with_torch_pruning(model: nn.Module, cfg: Config, request: dict,
                              clock: PhaseClock) -> dict:
    import torch_pruning
    model.requires_grad_(True)
    image = random_image(model, request['traced_shape'])
    importance = getattr(torch_pruning.importance, request['importance'])
    clock.enter('constructor')
    pruner = torch_pruning.pruner.BasePruner(
        model, image, importance=importance(), pruning_ratio=RATIO, global_pruning=False,
        ignored_layers=[model.get_submodule(name) for name in request['ignored']],
        forward_fn=run_as_tensors)
    clock.enter('step')
    pruner.step()
    return {}


def _build(cfg: Config) -> nn.Module:
    """A detector with random weights whose normalisation layers have scales of all sizes."""
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = build_detector(cfg)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.1, 1)
    return model


def _warm_up() -> None:
    """Let PyTorch load what every convolution needs."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))
    layers(torch.rand(1, 3, 64, 64)).sum().backward()


def _compute_predictions(model: nn.Module, shape: Sequence[int]) -> None:
    with torch.no_grad(), eval_mode(model):
        run_as_tensors(model, random_image(model, shape))


def _compute_loss(model: nn.Module, shape: Sequence[int]) -> None:
    """Compute the loss in train mode for two images of noise with a box each."""
    from mmengine.logging import MessageHub
    size = tuple(shape[1:])
    box = [0.1 * size[1], 0.2 * size[0], 0.7 * size[1], 0.9 * size[0]]
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1., 1.))
    if type(model).__module__.startswith('mmyolo'):
        samples = dict(bboxes_labels=torch.tensor([[0., 0., *box], [1., 0., *box]]),
                       img_metas=[meta, meta])
    else:
        samples = [_sample(box, meta) for _ in range(2)]
    MessageHub.get_current_instance().update_info('epoch', 0)
    model.train()
    model.loss(random_image(model, shape).repeat(2, 1, 1, 1), samples)


def _sample(box: Sequence[float], meta: dict):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    return DetDataSample(
        gt_instances=InstanceData(bboxes=torch.tensor([box]), labels=torch.tensor([0])),
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4),
                                       labels=torch.zeros(0, dtype=torch.long)),
        metainfo=meta)


def _num_params(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _memory(key: str) -> int:
    """Resident memory in bytes now (VmRSS) or at most (VmHWM); at most, if only that is known."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f'{key}:'))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == 'darwin' else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> bool:
    """Let the peak of the resident memory begin anew; False if the system cannot."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- what is printed
def describe_machine(threads: int) -> dict:
    """Say what has been measured on."""
    return dict(cpu=cpu_name(), cores=_num_cores(), threads=threads, torch=torch.__version__,
                torch_pruning=version('torch-pruning'), python=platform.python_version())


def _num_cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def print_report(report: dict) -> None:
    """Print the table, what its columns are, the machine, and the notes."""
    machine = report['machine']
    notes: List[str] = []
    header = ['model', 'params', 'ours', '/'.join(SHOWN_PHASES), 'comp.', 'TP', 'TP/ours',
              'mem', 'comp.', 'TP', 'left', 'TP']
    print('\n'.join(_markdown([header] + [_row(model, notes) for model in report['models']])))
    print()
    _print_wrapped(
        f'ours, comp., TP: seconds of mmgcp without and with compensation, and of Torch-Pruning '
        f'{machine["torch_pruning"]}; medians of {report["repeats"]}. {"/".join(SHOWN_PHASES)}: '
        'phases of ours. TP/ours: above 1, mmgcp is faster. mem, comp., TP: (peak resident memory '
        'during pruning - resident memory before building the model) / bytes of the parameters. '
        f'left, TP: % of the parameters that remain at a ratio of {report["ratio"]}.')
    runs = [run for model in report['models'] for variant in model['variants'].values()
            for run in variant['runs']]
    if not all(run.get('peak_reset', True) for run in runs):
        _print_wrapped('The peak of the memory could not be reset: it includes building the model.')
    others = [run['other_cores'] for run in runs if run.get('other_cores') is not None]
    if others and max(others) > 0.2:
        _print_wrapped(f'Other processes used {statistics.mean(others):.1f} cores on average '
                       f'meanwhile, and {max(others):.1f} at most: the times are too long.')
    print(f'Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, '
          f'torch {machine["torch"]}, Python {machine["python"]}.')
    if notes:
        print()
    for number, note in enumerate(notes, 1):
        _print_wrapped(f'[{number}] {note}')


def _row(model: dict, notes: List[str]) -> List[str]:
    """The cells of a model; what failed is added to the notes."""
    marks = {variant: _note(model, variant, notes) for variant in VARIANTS}
    ours, theirs, compensated = (model['variants'][variant] for variant in VARIANTS)
    times = [_number(item['seconds'], 2) + marks[variant]
             for variant, item in model['variants'].items()]
    phases = '/'.join(_number(ours['phases'].get(phase), 2) for phase in SHOWN_PHASES)
    memory = [_number(item['peak_multiple'], 1) for item in (ours, compensated, theirs)]
    params = model['params']
    left = [_number(item['params_left'] and 100 * item['params_left'] / params, 0)
            for item in (ours, theirs)]
    return [model['model'], _number(params and params / 1e6, 1, ' M'), times[0], phases, times[2],
            times[1], _number(model['ratio'], 2), *memory, *left]


def _note(model: dict, variant: str, notes: List[str]) -> str:
    """Add a note if something failed in a variant, and return its mark."""
    item = model['variants'][variant]
    failure, crashes = item['failure'], item.get('rejected', [])
    if not failure and not crashes:
        return ''
    parts = [f'{crash["importance"]} crashes in {crash["stage"]}: {crash["message"]}'
             for crash in crashes]
    outcome = f'fails in {failure["stage"]}: {failure["message"]}' if failure else 'works'
    parts.append(f'with {IMPORTANCES[-1]} it {outcome}' if crashes else outcome)
    notes.append(f'{model["model"]}: {VARIANTS[variant]}: {"; ".join(parts)}')
    return f' [{len(notes)}]'


def _number(value: Optional[float], digits: int, unit: str = '') -> str:
    return '-' if value is None else f'{value:.{digits}f}{unit}'


def _markdown(rows: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a table: the first row is the header, the first column is text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['|'.join(['', *(f' {cell:>{width}} ' if index else f' {cell:<{width}} '
                             for index, (cell, width) in enumerate(zip(row, widths))), ''])
             for row in rows]
    rule = '|'.join(['', *('-' * (width + 1) + (':' if index else '-')
                           for index, width in enumerate(widths)), ''])
    return [lines[0], rule, *lines[1:]]


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, WIDTH, subsequent_indent='  ', break_long_words=False))


if __name__ == '__main__':
    run_tool(main)
