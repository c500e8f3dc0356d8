# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
r"""How much of the speed that pruning promises arrives: five small detectors, in three programs.

A detector with random weights is pruned to a share of its MACs, fused and exported. It promises to
be 1 / share times as fast, and it is measured how many times as fast it is: CPU times of one
thread, of the original and the pruned networks in turns, of which the ratio of each round is
taken, and the median of the ratios. So a machine that is busy with other things changes the
milliseconds, but hardly the ratios.

Where less than 90 % of the promise arrives in onnxruntime, its profile names the layers that take
most time beyond that share of their old time: wall times, which are good for finding layers, not
for adding up.

What is measured is not measured again; each start prints all that is there. For example:

  python benchmarks/latency.py --models yolov5-n yolov8-n --round-to 1 8 16
"""
import argparse
import copy
import json
import statistics
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch.nn as nn
from prune_speed import MODELS, ROOT, _build, _markdown, describe_machine
from runs import Runs

from mmgcp.deployment.timing import (
    RUNTIMES,
    exported_file,
    installed_runtimes,
    make_run,
    speedups,
    take_turns,
)
from mmgcp.errors import UserError
from mmgcp.nn.forward import random_image
from mmgcp.pruning import prune
from mmgcp.pruning.options import BLOCK
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import load_config

CONFIGS = dict(
    {name: MODELS[name] for name in ('yolov5-n', 'yolov8-n', 'yolov7-tiny', 'rtmdet-tiny')},
    **{'yolov4-n': str(ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py')})
ENOUGH = 0.9  # of the promise
NAMED = 3  # layers
PROFILED = 15  # runs


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=CONFIGS, default=list(CONFIGS),
                        metavar='MODEL', help=f'among {", ".join(CONFIGS)}; default: all')
    parser.add_argument('--remove', type=float, nargs='+', default=[0.35, 0.5],
                        help='shares of the MACs to remove; default: 0.35 0.5')
    parser.add_argument('--round-to', type=int, nargs='+',
                        default=[BLOCK], metavar='N',
                        help='as for tools/prune.py; default: its default')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, metavar='PROGRAM',
                        help=f'among {", ".join(RUNTIMES)}; default: those that are installed')
    parser.add_argument('--size', type=int, default=416, help='of images; default: 416')
    parser.add_argument('--rounds', type=int, default=20, help='of measuring; default: 20')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/latency'))
    parser.add_argument('--report', action='store_true', help='only print what is there')
    return parser.parse_args()


def main():
    args = parse_args()
    if any(not 0 < share < 1 for share in args.remove):
        raise UserError('shares of the MACs to remove must be in (0, 1)')
    if args.rounds < 1 or min(args.round_to) < 1 or args.size < 32 or args.size % 32:
        raise UserError('--rounds and --round-to must be at least 1, --size a multiple of 32')
    runs = Runs(args.work_dir)
    if not args.report:
        for name in args.models:
            measure(runs, name, args)
    print_results(runs)


def measure(runs: Runs, name: str, args: argparse.Namespace) -> None:
    """Measure what has not been measured of a detector: all of a program's networks in turns."""
    pending = {runtime: [variant for variant in variants(name, runtime, args)
                         if not runs.is_done(run_name(variant), variant)]
               for runtime in args.runtimes or installed_runtimes()}
    if not any(pending.values()):
        return
    shape, original = (3, args.size, args.size), _build(load_config(CONFIGS[name]))
    networks: Dict[tuple, Any] = {}
    for runtime, todo in pending.items():
        for variant in todo:
            key = variant['remove'], variant['round_to']
            if key not in networks:
                networks[key] = prune(
                    copy.deepcopy(original), target_flops=1 - key[0], round_to=key[1],
                    input_shape=shape, compensate=False)
        if todo:
            measure_in(runs, runtime, original, todo, networks, shape, args.rounds)


def variants(name: str, runtime: str, args: argparse.Namespace) -> List[dict]:
    """What is measured of a detector in a program."""
    return [dict(kind='latency', model=name, runtime=runtime, remove=remove, round_to=multiple,
                 size=args.size, version=version(runtime))
            for remove in args.remove for multiple in args.round_to]


def run_name(variant: dict) -> str:
    """The name of a measurement."""
    return '-'.join(str(variant[key]) for key in ('model', 'runtime', 'remove', 'round_to', 'size'))


def measure_in(runs: Runs, runtime: str, original: nn.Module, todo: Sequence[dict],
               networks: Dict[tuple, Any], shape: Sequence[int], rounds: int) -> None:
    """Measure pruned networks beside their original in a program."""
    pruned = [networks[variant['remove'], variant['round_to']] for variant in todo]
    times = take_turns([make_run(network, shape, runtime)
                        for network in (original, *(result.model for result in pruned))], rounds)
    before: Optional[dict] = None
    for variant, result, faster, taken in zip(todo, pruned, speedups(times)[1:], times[1:]):
        share = result.macs[1] / result.macs[0]
        values = dict(share=share, speedup=faster, arrived=faster * share,
                      ms=[statistics.median(times[0]), statistics.median(taken)],
                      machine=describe_machine(1), slow=[])
        if runtime == 'onnxruntime' and values['arrived'] < ENOUGH:
            before = before or profile(original, shape)
            values['slow'] = slow_layers(result, before, profile(result.model, shape))
        runs.finish(run_name(variant), variant, values)


def profile(network: nn.Module, shape: Sequence[int]) -> Dict[str, float]:
    """The milliseconds of each layer of a network in onnxruntime, by its own profile."""
    import onnxruntime
    with tempfile.TemporaryDirectory() as folder, exported_file(network, shape, '.onnx') as path:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, f'{folder}/profile'
        session = onnxruntime.InferenceSession(str(path), options,
                                               providers=['CPUExecutionProvider'])
        images = random_image(network, shape).numpy()
        for _ in range(PROFILED):
            session.run(None, {'images': images})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: Dict[str, List[float]] = defaultdict(list)
    for event in events:
        layer = layer_of(event)
        if layer:
            times[layer].append(event['dur'] / 1000)
    return {layer: statistics.median(taken) for layer, taken in times.items()}


def layer_of(event: dict) -> str:
    """The name of the convolution that an event of a profile is about, '' if it is none.

    Nodes are named by their paths: /detector/neck/conv/Conv, or that with what the blocked kernel
    adds.
    """
    name = event.get('name', '')
    if event.get('cat') != 'Node' or not name.endswith('_kernel_time'):
        return ''
    if event['args'].get('op_name') != 'Conv' or not name.startswith('/detector/'):
        return ''
    return '.'.join(name[len('/detector/'):].split('/Conv')[0].split('/'))


def slow_layers(result, before: Dict[str, float], after: Dict[str, float]) -> List[dict]:
    """The layers that take most time beyond what is promised of the whole, with their widths."""
    found, promise = [], result.macs[1] / result.macs[0]
    for layer in before.keys() & after.keys():
        name = matching(layer, result.channels_before)
        if name:
            was, now = result.channels_before[name], result.channels_after[name]
            share = now[0] * now[1] / (was[0] * was[1])
            found.append(dict(layer=name, before=was, after=now, share=share,
                              ms=[before[layer], after[layer]],
                              beyond=after[layer] - promise * before[layer]))
    found.sort(key=lambda item: -item['beyond'])
    return [item for item in found[:NAMED] if item['beyond'] > 0]


def matching(path: str, names) -> str:
    """The layer that the path of a node stands for, which repeats names of lists: a.a.0.conv."""
    parts = path.split('.')
    short = '.'.join(part for index, part in enumerate(parts)
                     if index + 1 == len(parts) or parts[index + 1] != part)
    return next((name for name in (path, short) if name in names), '')


# ---------------------------------------------------------------- what is printed
def print_results(runs: Runs) -> None:
    """Print the table, the machine, and the layers that stand in the way."""
    results = sorted(runs.results('latency'), key=lambda item: run_name(item['inputs']))
    if not results:
        raise UserError(f'there are no results in {runs.folder}')
    rows: Dict[tuple, Dict[str, dict]] = defaultdict(dict)
    for item in results:
        given = item['inputs']
        rows[given['model'], given['size'], given['remove'], given['round_to']][
            given['runtime']] = item
    runtimes = [name for name in RUNTIMES if any(name in found for found in rows.values())]
    print('\n'.join(_markdown(
        [['model', 'size', 'MACs', 'multiple', 'promise', *runtimes]]
        + [_row(key, found, runtimes) for key, found in rows.items()])))
    machine = results[-1]['machine']
    versions = ', '.join(sorted({f'{item["inputs"]["runtime"]} {item["inputs"]["version"]}'
                                 for item in results}))
    print(f'\nTimes as fast, and the share of the promise. One thread of {machine["cpu"]}; '
          f'{versions}; Python {machine["python"]}.')
    for item in results:
        given = item['inputs']
        if item['slow']:
            print(f'\n{given["model"]}, -{given["remove"]:.0%} MACs, multiples of '
                  f'{given["round_to"]}: {item["arrived"]:.0%} of the promise')
        for layer in item['slow']:
            print(f'  {layer["layer"]}: {_widths(layer["before"])} -> {_widths(layer["after"])} '
                  f'channels, {layer["ms"][0]:.2f} -> {layer["ms"][1]:.2f} ms, '
                  f'{layer["share"]:.0%} of its MACs')


def _row(key: tuple, found: Dict[str, dict], runtimes: Sequence[str]) -> List[str]:
    """The cells of a pruned network."""
    share = next(iter(found.values()))['share']
    return [key[0], str(key[1]), f'-{1 - share:.1%}', str(key[3]), f'{1 / share:.2f}',
            *(f'{found[name]["speedup"]:.2f} ({found[name]["arrived"]:.0%})'
              if name in found else '-' for name in runtimes)]


def _widths(channels: Sequence[int]) -> str:
    return ' to '.join(map(str, channels))


if __name__ == '__main__':
    run_tool(main)
