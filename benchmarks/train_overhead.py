# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the sparsity hook and the distiller add to a training step, in time and in memory.

Compared are, on a batch of noise with a few boxes:

- with a plain training step (loss, backward, SGD with momentum and weight decay, through
  MMEngine's OptimWrapper): the same with ``DynamicSparsityHook`` and its two-phase schedule,
  as 'subgradient', 'proximal', or 'coupled' (group lasso). The goal is at most 1 % more time.
- with a step of the student after a forward pass of the teacher without gradients, in a loop
  written by hand: the student in ``SpatialAttentionDistiller`` with ``groups='auto'``, then
  with a channel-wise loss on the neck's outputs beside these, then with a loss of the response
  beside all of that. The goal is at most 5 % more time.

The student is the model itself pruned at a ratio of 0.4 or, with ``--student``, that of a
config. All weights are random: the teacher is confident of nearly all predictions, which the
loss of the response takes longest for.

For the times, blocks of steps with and without take turns in one process, and every other pair
begins with the other one. The overhead is the median over the pairs of the ratio of the two
blocks, less 1. Each peak of memory is measured in a process of its own: on the CPU that of the
resident memory above what was resident before the models were built, after a step of the same
on small images, with an allocator that returns what is freed; on CUDA that of PyTorch's allocator.
"""
import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from prune_speed import (
    ROOT,
    PhaseClock,
    _build,
    _markdown,
    _memory,
    _num_params,
    _print_wrapped,
    _reset_peak,
    _sample,
    describe_machine,
)

from mmgcp.errors import UserError
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, image_size, load_config
from mmgcp.utils.config_content import plain_content

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py'
RATIO = 0.4
WARM_UP = 3  # steps of each variant that are not measured
MEMORY_STEPS = 3
TIMEOUT = 900  # seconds that measuring a variant's memory may take
GOALS = {'hook': 0.01, 'distiller': 0.05}

CWD = dict(name='cwd', weight=1., layers='neck_outputs', loss=dict(type='mmgcp.ChannelWiseLoss'))
AUTO = [dict(name='backbone', weight=1e2, layers='backbone_outputs'),
        dict(name='neck', weight=1., layers='neck_outputs')]  # what groups='auto' stands for
RESPONSE = dict(type='mmgcp.ResponseLoss')
HOOKS = {
    'subgradient': dict(penalty='subgradient'),
    'proximal': dict(penalty='proximal'),
    'coupled': dict(penalty='subgradient', coupled=True),
}
DISTILLERS = {
    'attention': dict(groups='auto'),
    'cwd': dict(groups=[*AUTO, CWD]),
    'response': dict(groups=[*AUTO, CWD], response=RESPONSE),
}
# Variant -> what it is compared with
BASELINES = {**dict.fromkeys(HOOKS, 'plain'), **dict.fromkeys(DISTILLERS, 'by_hand')}
TITLES = {
    'plain': 'plain',
    'subgradient': '+ hook, subgradient',
    'proximal': '+ hook, proximal',
    'coupled': '+ hook, coupled',
    'by_hand': 'student + teacher',
    'attention': 'distiller, attention',
    'cwd': '+ channel-wise',
    'response': '+ response',
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(CONFIG),
                        help='config of a detector of MMYOLO; default: the small YOLOv4')
    parser.add_argument('--student', help='config of a pruned one; default: pruned here')
    parser.add_argument('--variants', nargs='+', choices=list(BASELINES), default=list(BASELINES),
                        metavar='VARIANT', help=f'among {", ".join(BASELINES)}; default: all')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--size', type=int,
                        help="width and height of the images; default: the config's")
    parser.add_argument('--iterations', type=int, default=1, help='steps of a block')
    parser.add_argument('--pairs', type=int, default=15, help='pairs of blocks')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="threads of PyTorch; default: PyTorch's own, see OMP_NUM_THREADS")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', type=Path, help='JSON file for all figures')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.child:
        run_child(args.child)
        return
    check_args(args)
    cfg = load_config(args.config)
    args.size = args.size or image_size(cfg)[0]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        setup = make_setup(args, cfg, Path(folder))
        report = dict(
            machine=describe_machine(args.threads), device=describe_device(args.device),
            **{key: setup[key] for key in ('config', 'student', 'params', 'batch_size', 'size')},
            iterations=args.iterations, pairs=args.pairs, goals=GOALS)
        if not args.student:
            report['student'] = f'pruned at a ratio of {RATIO}'
        baselines = [name for name in TITLES if name in {BASELINES[key] for key in args.variants}]
        peaks = {}
        for name in TITLES:
            if name in baselines or name in args.variants:
                _tell(f'{TITLES[name]}: memory')
                peaks[name] = run_in_process(dict(setup, variant=name))
        blocks, other_cores = measure_times(setup, baselines, args)
    report.update(other_cores=other_cores, variants=summarize(blocks, peaks))
    print_report(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + '\n')


def check_args(args: argparse.Namespace) -> None:
    """Raise an error about the first argument that is wrong."""
    for name in ('batch_size', 'iterations', 'pairs', 'threads'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1')
    if args.size is not None and (args.size < 32 or args.size % 32):
        raise UserError(f'--size must be a multiple of 32, but is {args.size}')
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {args.device} cannot be used: '
                        f'{str(error).splitlines()[0]}') from None
    if args.out and (args.out.is_dir() or not args.out.resolve().parent.is_dir()):
        raise UserError(f'--out {args.out} is a folder, or in a folder that does not exist')
    if args.student:
        load_config(args.student)


# ---------------------------------------------------------------- what is trained
def make_setup(args: argparse.Namespace, cfg: Config, folder: Path) -> dict:
    """Write the teacher's weights and the student's config, for all processes.

    Args:
        args (argparse.Namespace): See :func:`parse_args`.
        cfg (Config): The config of the model, which is the teacher.
        folder (Path): Where to write.

    Returns:
        dict: What :class:`Training` and the processes need, to be written as JSON.
    """
    from mmgcp.pruning import prune
    from mmgcp.pruning.detector import make_pruned_config, registered_name
    _tell('preparing teacher and student')
    model = _build(cfg)
    checkpoint, student = folder / 'teacher.pth', args.student
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    params = dict(model=_num_params(model))
    if student is None:
        detector = registered_name(type(model))
        result = prune(model, ratio=RATIO, compensate=False, input_shape=(3, args.size, args.size))
        student = folder / 'student.py'
        make_pruned_config(cfg, detector, result.changed_channels).dump(student)
    params['student'] = _num_params(build_detector(load_config(str(student))))
    return dict(
        config=args.config, student=str(student), checkpoint=str(checkpoint), params=params,
        batch_size=args.batch_size, size=args.size, device=args.device, threads=args.threads,
        max_iters=WARM_UP + args.pairs * args.iterations)


class Training:
    """A variant, ready to make its steps.

    Args:
        variant (str): A key of :data:`TITLES`.
        setup (dict): What :func:`make_setup` returned.

    Raises:
        UserError: The variant cannot be built.
    """

    def __init__(self, variant: str, setup: dict):
        from mmengine.logging import MessageHub
        self.variant = variant
        self.setup = setup
        try:
            self.teacher = self._build_teacher() if variant == 'by_hand' else None
            self.model = self._build_model().to(setup['device']).train()
            self.optim_wrapper = self._build_optim_wrapper()
            self.message_hub = MessageHub.get_current_instance()
            self.runner = self._runner()
            self.hook = self._build_hook()
        except Exception as error:  # whatever models and hooks raise
            raise self._failed('built', error) from error
        self.message_hub.update_info('epoch', 0)
        self.message_hub.update_info('iter', 0)
        generator = torch.Generator().manual_seed(0)
        size = setup['size']
        self.images = torch.rand(
            setup['batch_size'], 3, size, size, generator=generator).to(setup['device'])

    def step(self) -> None:
        """Make a step, as MMEngine's training loop does but for loading the data."""
        samples = self._samples()
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(self.images, mode='tensor')
        with self.optim_wrapper.optim_context(self.model):
            losses = self.model(self.images, samples, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.optim_wrapper.update_params(loss)
        if self.hook is not None:
            self.hook.after_train_iter(self.runner, self.runner.iter)
        self.runner.iter += 1

    def run(self, steps: int) -> Tuple[float, float]:
        """Make some steps.

        Returns:
            tuple[float, float]: Seconds of a step, and those on all cores together.
        """
        self._synchronize()
        since = time.perf_counter(), time.process_time()
        try:
            for _ in range(steps):
                self.step()
        except Exception as error:  # whatever a model raises
            raise self._failed('trained', error) from error
        self._synchronize()
        return (time.perf_counter() - since[0]) / steps, (time.process_time() - since[1]) / steps

    def _failed(self, what: str, error: Exception) -> UserError:
        first_line = (str(error).strip().splitlines() or [''])[0]
        return UserError(f'the variant {self.variant} cannot be {what}: '
                         f'{type(error).__name__}: {first_line}')

    def _synchronize(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def _build_teacher(self) -> torch.nn.Module:
        from mmgcp.utils.checkpoint import load_strictly
        teacher = build_detector(load_config(self.setup['config']))
        load_strictly(teacher, self.setup['checkpoint'])
        return teacher.to(self.setup['device']).eval().requires_grad_(False)

    def _build_model(self) -> torch.nn.Module:
        if BASELINES.get(self.variant, self.variant) == 'plain':
            return _build(load_config(self.setup['config']))
        cfg = load_config(self.setup['student'])
        if self.variant in DISTILLERS:
            cfg.model = dict(
                type='mmgcp.SpatialAttentionDistiller', student=plain_content(cfg.model),
                teacher={key: self.setup[key] for key in ('config', 'checkpoint')},
                **DISTILLERS[self.variant])
        return _build(cfg)

    def _build_optim_wrapper(self):
        from mmengine.optim import OptimWrapper
        # At such a rate the weights hardly change, which costs as much
        return OptimWrapper(torch.optim.SGD(
            self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4))

    def _runner(self) -> SimpleNamespace:
        """What the hook needs of MMEngine's Runner."""
        max_iters = self.setup['max_iters']
        return SimpleNamespace(
            model=self.model, optim_wrapper=self.optim_wrapper, message_hub=self.message_hub,
            logger=logging.getLogger('train_overhead'), epoch=0, iter=0, max_iters=max_iters,
            train_dataloader=range(max_iters + 1))

    def _build_hook(self):
        from mmgcp.sparsity import DynamicSparsityHook
        if self.variant not in HOOKS:
            return None
        hook = DynamicSparsityHook(
            rate=1e-3, schedule=dict(type='two_phase'), **HOOKS[self.variant])
        hook.before_train(self.runner)
        return hook

    def _samples(self):
        size, count = (self.setup['size'], ) * 2, self.setup['batch_size']
        boxes = size[0] * torch.tensor([[.1, .1, .6, .7], [.3, .4, .9, .9], [0., 0., .3, .25]])
        meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1., 1.))
        model = getattr(self.model, 'student', self.model)
        if type(model).__module__.startswith('mmyolo'):
            owners = torch.arange(count).repeat_interleave(len(boxes))[:, None].float()
            rows = torch.cat((owners, torch.zeros_like(owners), boxes.repeat(count, 1)), 1)
            return dict(bboxes_labels=rows.to(self.setup['device']), img_metas=[meta] * count)
        return [_sample(boxes[0].tolist(), meta).to(self.setup['device']) for _ in range(count)]


# ---------------------------------------------------------------- times
def measure_times(setup: dict, baselines: Sequence[str], args: argparse.Namespace
                  ) -> Tuple[Dict[str, List[dict]], Optional[float]]:
    """Let each variant and its baseline take turns.

    Args:
        setup (dict): What :func:`make_setup` returned.
        baselines (Sequence[str]): The baselines of the chosen variants.
        args (argparse.Namespace): Has ``variants``, ``pairs`` and ``iterations``.

    Returns:
        tuple: The pairs of each variant, with ``seconds`` and ``cpu_seconds`` of a step of
        the baseline and of the variant; and the cores that other processes used meanwhile,
        on average, None if that is unknown.
    """
    blocks: Dict[str, List[dict]] = {}
    clock = PhaseClock()
    for baseline in baselines:
        without = Training(baseline, setup)
        without.run(WARM_UP)
        for variant in (name for name in args.variants if BASELINES[name] == baseline):
            _tell(f'{TITLES[variant]}: time')
            trained = Training(variant, setup)
            trained.run(WARM_UP)
            clock.enter('steps')
            blocks[variant] = [_run_pair(without, trained, args.iterations, number % 2 == 1)
                               for number in range(args.pairs)]
            clock.stop()
            del trained
            gc.collect()
        del without
    return blocks, clock.other_cores


def _run_pair(without: Training, trained: Training, steps: int, backwards: bool) -> dict:
    order = [trained, without] if backwards else [without, trained]
    figures = [training.run(steps) for training in order]
    if backwards:
        figures.reverse()
    seconds, cpu_seconds = map(list, zip(*figures))
    return dict(seconds=seconds, cpu_seconds=cpu_seconds)


# ---------------------------------------------------------------- memory
def run_in_process(request: dict) -> int:
    """Measure the peak of a variant's memory in a process of its own.

    Args:
        request (dict): The setup and the ``variant``.

    Returns:
        int: Bytes.

    Raises:
        UserError: The process has failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), '--child', json.dumps(request)]
    # With glibc, free memory goes back to the system at once, so that what is resident is used
    env = dict(os.environ, PYTHONWARNINGS='ignore', MALLOC_MMAP_THRESHOLD_='65536',
               MALLOC_TRIM_THRESHOLD_='65536')
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, env=env)
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(f'the variant {request["variant"]} made no {MEMORY_STEPS} steps in '
                        f'{TIMEOUT} s') from None
    finally:  # also when interrupted
        process.kill()
        process.wait()
    if process.returncode or not output.strip():
        lines = errors.strip().splitlines() or [f'status {process.returncode}']
        raise UserError(f'measuring the memory failed: {lines[-1]}')
    return json.loads(output.splitlines()[-1])['peak_bytes']


def run_child(request: dict) -> None:
    """Measure the peak of a variant's memory, and print it as a line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        peak = measure_memory(request)
    print(json.dumps(dict(peak_bytes=peak)))


def measure_memory(request: dict) -> int:
    """The peak in bytes from building the models to the end of the last step."""
    torch.set_num_threads(request['threads'])
    for package in ('mmdet.models', 'mmyolo.models', 'mmgcp.models', 'mmgcp.pruning',
                    'mmgcp.distillation', 'mmgcp.sparsity', 'torch_pruning'):
        importlib.import_module(package)
    if torch.device(request['device']).type == 'cpu':
        # What the system and Python load once for each variant is no memory of its training
        Training(request['variant'], dict(request, batch_size=2, size=128)).run(1)
    gc.collect()
    before = _memory('VmRSS')
    _reset_peak()
    training = Training(request['variant'], request)
    training.run(MEMORY_STEPS)
    if training.images.is_cuda:
        return torch.cuda.max_memory_allocated(training.images.device)
    return _memory('VmHWM') - before


# ---------------------------------------------------------------- what is printed
def describe_device(device: str) -> str:
    """Name of the GPU, or 'CPU'."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return device.upper()


def summarize(blocks: Dict[str, List[dict]], peaks: Dict[str, int]) -> Dict[str, dict]:
    """Reduce the pairs to medians.

    Args:
        blocks (dict[str, list[dict]]): The pairs of each variant; see :func:`measure_times`.
        peaks (dict[str, int]): Peak of the memory in bytes of each variant and baseline.

    Returns:
        dict[str, dict]: The figures of each variant and baseline. Only variants have ratios,
        a goal, and whether it is met.
    """
    variants = {}
    for name in TITLES:
        if name in blocks:
            variants[name] = _summarize_variant(name, blocks[name], peaks)
        elif name in peaks:
            times = [pair['seconds'][0] for variant, pairs in blocks.items()
                     if BASELINES[variant] == name for pair in pairs]
            variants[name] = dict(seconds=statistics.median(times), peak_bytes=peaks[name])
    return variants


def _summarize_variant(name: str, pairs: Sequence[dict], peaks: Dict[str, int]) -> dict:
    ratios, cpu_ratios = ([pair[key][1] / pair[key][0] for pair in pairs]
                          for key in ('seconds', 'cpu_seconds'))
    goal = 1 + GOALS['hook' if name in HOOKS else 'distiller']
    ratio = statistics.median(ratios)
    memory_ratio = peaks[name] / peaks[BASELINES[name]]
    return dict(
        against=BASELINES[name],
        seconds=statistics.median(pair['seconds'][1] for pair in pairs),
        against_seconds=statistics.median(pair['seconds'][0] for pair in pairs),
        ratio=ratio, quartiles=_quartiles(ratios), cpu_ratio=statistics.median(cpu_ratios),
        cpu_quartiles=_quartiles(cpu_ratios), peak_bytes=peaks[name], memory_ratio=memory_ratio,
        goal=goal, time_met=ratio <= goal, memory_met=memory_ratio <= goal, pairs=list(pairs))


def _quartiles(values: Sequence[float]) -> List[float]:
    if len(values) == 1:
        return [values[0]] * 2
    lower, _, upper = statistics.quantiles(values, n=4, method='inclusive')
    return [lower, upper]


def print_report(report: dict) -> None:
    """Print the table, what its columns are, the machine, and whether the goals are met."""
    machine, variants, params = report['machine'], report['variants'], report['params']
    header = ['variant', 'step', 'without', 'more', 'quartiles', 'on CPU', 'met', 'memory', 'more',
              'met']
    rows = [_row(name, figures) for name, figures in variants.items()]
    print('\n'.join(_markdown([header, *rows])))
    print()
    _print_wrapped(
        f'{Path(report["config"]).stem}, {params["model"] / 1e6:.2f} M parameters, the student '
        f'({report["student"]}) {params["student"] / 1e6:.2f} M; batches of '
        f'{report["batch_size"]} images of {report["size"]}x{report["size"]}.')
    _print_wrapped(
        'step, without: milliseconds of a step of the variant and, next to it, of what it is '
        f'compared with (plain, or student + teacher), medians of {report["pairs"]} blocks of '
        f'{report["iterations"]}. more: median of the ratios of neighbouring blocks, less 1, with '
        "its quartiles. on CPU: the same of the process's CPU time, which other processes disturb "
        'less. met: whether the goal is met, with a question mark if it lies between the '
        'quartiles. memory: peak in MiB.')
    others = report['other_cores']
    if others is not None and others > 0.2:
        _print_wrapped(f'Other processes used {others:.1f} cores on average meanwhile: the times '
                       'are too long.')
    for kind, names in (('hook', HOOKS), ('distiller', DISTILLERS)):
        chosen = {name: variants[name] for name in names if name in variants}
        if chosen:
            _print_wrapped(f'Goal of the {kind}, at most {GOALS[kind]:.0%} more: '
                           f'{_verdict(chosen, "time")}; {_verdict(chosen, "memory")}.')
    print(f'Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, '
          f'torch {machine["torch"]}, {report["device"]}.')


def _verdict(variants: Dict[str, dict], what: str) -> str:
    missed = [name for name, figures in variants.items() if not figures[f'{what}_met']]
    return f'{what} met' if not missed else f'{what} missed by {", ".join(missed)}'


def _row(name: str, figures: dict) -> List[str]:
    cells = [TITLES[name], f'{1e3 * figures["seconds"]:.1f}']
    memory = f'{figures["peak_bytes"] / 2**20:.1f}'
    if 'ratio' not in figures:
        return [*cells, *['-'] * 5, memory, '-', '-']
    lower, upper = figures['quartiles']
    unsure = '?' if lower <= figures['goal'] <= upper else ''
    return [*cells, f'{1e3 * figures["against_seconds"]:.1f}', _percent(figures['ratio']),
            f'{_percent(lower)} to {_percent(upper)}', _percent(figures['cpu_ratio']),
            _yes_or_no(figures['time_met']) + unsure, memory, _percent(figures['memory_ratio']),
            _yes_or_no(figures['memory_met'])]


def _percent(ratio: float) -> str:
    return f'{ratio - 1:+.1%}'


def _yes_or_no(answer: bool) -> str:
    return 'yes' if answer else 'no'


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == '__main__':
    run_tool(main)
