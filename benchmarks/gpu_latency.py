# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Times of detectors on a GPU, without decoding, for batches of one and of many images.

Convolutions have the BatchNorms behind them folded in. In single precision, with TF32 off, and
in half precision with channels last; each as PyTorch runs it and as a CUDA graph, which leaves
out what launching the kernels takes. The rounds of all detectors are interleaved; medians of
the rounds. For example:

  python benchmarks/gpu_latency.py original.py original.pth pruned.py pruned.pth
"""
import argparse
from statistics import median
from typing import Callable, Dict, List, Sequence

import torch
import torch.nn as nn
from prune_speed import _markdown

from mmgcp.analysis import count_complexity
from mmgcp.deployment.fusion import fused
from mmgcp.errors import UserError
from mmgcp.nn.forward import random_image, run_as_tensors
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, load_config

WARM_UP = 5  # passes


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', help='CONFIG CHECKPOINT of one detector or more')
    parser.add_argument('--size', type=int, default=416, help='of the images; default: 416')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 32],
                        help='default: 1 32')
    parser.add_argument('--no-graphs', action='store_true', help='without CUDA graphs')
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--passes', type=int, default=5, help='of each round')
    return parser.parse_args()


def load(config: str, checkpoint: str) -> nn.Module:
    """A detector on the GPU, fused, in eval mode."""
    model = build_detector(load_config(config))
    load_strictly(model, checkpoint, config)
    return fused(model.cuda().eval())


def as_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Return what replays the kernels of a function."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], passes: int) -> float:
    """The mean time of some passes, as the GPU measures it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(passes):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / passes


def time_all(models: Sequence[nn.Module], batch: int, args: argparse.Namespace,
             half: bool) -> Dict[str, List[float]]:
    """Times of all detectors for a batch, with and without a graph."""
    runs: Dict[str, List[Callable]] = {'': []} if args.no_graphs else {'': [], ', graph': []}
    for model in models:
        image = random_image(model, (3, args.size, args.size)).repeat(batch, 1, 1, 1)
        if half:
            model.half()
            model.to(memory_format=torch.channels_last)
            image = image.half().contiguous(memory_format=torch.channels_last)
        runs[''].append(lambda model=model, image=image: run_as_tensors(model, image))
        for _ in range(WARM_UP):
            runs[''][-1]()
        if not args.no_graphs:
            runs[', graph'].append(as_graph(runs[''][-1]))
    found = {kind: [[] for _ in models] for kind in runs}
    for _ in range(args.rounds):
        for kind, functions in runs.items():
            for times, run in zip(found[kind], functions):
                times.append(milliseconds(run, args.passes))
    return {kind: [median(times) for times in found[kind]] for kind in runs}


@torch.no_grad()
def main():
    args = parse_args()
    if not torch.cuda.is_available():
        raise UserError('there is no GPU here')
    if len(args.files) % 2:
        raise UserError('expected CONFIG CHECKPOINT of each detector')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    models = [load(*pair) for pair in zip(args.files[::2], args.files[1::2])]
    rows = [['GMACs', '', *(f'{count_complexity(model, (3, args.size, args.size))[1] / 1e9:.2f}'
                            for model in models)]]
    for half in (False, True):  # in half precision last, as the models keep it
        for batch in args.batch_sizes:
            for kind, times in time_all(models, batch, args, half).items():
                rows.append([f'{"half" if half else "single"} precision{kind}', str(batch),
                             *(f'{value:.3f} ({times[0] / value:.2f}x)' for value in times)])
    print(f'{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.size} pixels, ms '
          'for a batch')
    print(*_markdown([['', 'images', *args.files[::2]], *rows]), sep='\n')


if __name__ == '__main__':
    run_tool(main)
