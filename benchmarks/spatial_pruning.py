# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The time that dynamic spatial pruning saves, against the share of cells that are computed.

Two tables, each of medians of CPU time (which other processes of the machine hardly change) of
runs that take turns, on one image of noise and random weights:

- the layers of the finest level alone (what the neck computes only for it, and its head): dense,
  and on tiles at several shares of active tiles, which are chosen at random;
- the whole detector without post-processing: with the strides 8, 16, 32; with stride 4, dense;
  and with stride 4 pruned. There the masks are replaced by ones that keep random squares.

How many tiles a trained detector computes depends on its images and on tau: ``--config CONFIG
--checkpoint CHECKPOINT`` measures that instead, with the accuracy on the config's validation
images, or on ``--val``, and the CPU time an image, post-processing included. A detector without
masks gets some, which are fitted to its features on ``--train`` with all its weights fixed
(``--fit-masks STEPS``).
"""
import argparse
import statistics
import time
from dataclasses import replace
from typing import Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.config import Config
from peers_data import images, with_test_data, with_training_data
from prune_speed import ROOT, _markdown, describe_machine

from mmgcp.datasets.calibration import calibration_batches, evaluate
from mmgcp.nn.forward import random_image
from mmgcp.spatial import SpatialInference, find_inference
from mmgcp.spatial.masks import batch_boxes, mask_loss
from mmgcp.spatial.tiles import active_places
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, image_size, load_config

CONFIGS = dict(
    yolov5=('yolov5/yolov5_n-v61_fast_1xb16-60e_voc-320.py',
            'yolov5/yolov5_n-v61-p2_fast_1xb16-60e_voc-320.py',
            'yolov5/yolov5_n-v61-p2-spatial_fast_1xb16-60e_voc-320.py'),
    yolov4=('yolov4/yolov4_n_fast_1xb8-60e_voc-320.py',
            'yolov4/yolov4_n-p2_fast_1xb8-60e_voc-320.py',
            'yolov4/yolov4_n-p2-spatial_fast_1xb8-60e_voc-320.py'))
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
TAUS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--detectors', nargs='+', choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument('--size', type=int, help='side of the image in pixels; default: 640, and '
                        'that of its test images for --config')
    parser.add_argument('--runs', type=int, default=15, help='runs of each kind')
    parser.add_argument('--shares', type=float, nargs='+', default=list(SHARES))
    parser.add_argument('--config', help='config of a detector that is measured by tau')
    parser.add_argument('--checkpoint')
    parser.add_argument('--taus', type=float, nargs='+', default=list(TAUS))
    parser.add_argument('--train', type=images, metavar='ANNOTATIONS:FOLDER',
                        help="in COCO's format, to fit masks on")
    parser.add_argument('--val', type=images, metavar='ANNOTATIONS:FOLDER')
    parser.add_argument('--fit-masks', type=int, default=0, metavar='STEPS')
    parser.add_argument('--metric', help="such as coco/bbox_mAP_s; default: the config's first mAP")
    parser.add_argument('--levels', type=int, nargs='+', help='strides; default: the finest one')
    return parser.parse_args()


def interleaved(functions: Dict[str, Callable[[], object]], runs: int) -> Dict[str, float]:
    """Return medians of CPU time in milliseconds; the first run of each does not count."""
    times: Dict[str, List[float]] = {name: [] for name in functions}
    for _ in range(runs + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def random_tiles(rows: int, columns: int, share: float) -> torch.Tensor:
    """Choose a share of tiles (1, 1, rows, columns) at random."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(rows * columns, dtype=torch.bool)
    chosen[order[:max(1, round(share * rows * columns))]] = True
    return chosen.view(1, 1, rows, columns)


@torch.no_grad()
def time_layers(model: nn.Module, args: argparse.Namespace) -> Dict[str, float]:
    """Time the layers of the finest level, dense and on tiles."""
    layers = find_inference(model).layers[0]
    stride, tile = find_inference(model).strides[0], layers.tile
    side = args.size // stride
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, channels, side // ratio, side // ratio, generator=generator)
              for channels, ratio in layers.inputs]
    functions = {'dense': lambda: layers(inputs)}
    for share in args.shares:
        tiles = random_tiles(-(-side // tile), -(-side // tile), share)
        keep = tiles.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :side, :side]
        places = active_places(keep, tile)
        functions[f'{share:.0%}'] = lambda places=places: layers.on_tiles(inputs, places)
    return interleaved(functions, args.runs)


def keep_random_tiles(inference: SpatialInference, share: float) -> None:
    """Let the masks keep a share of the finest level's tiles, whatever the image."""
    def logits(stride: int, maps: torch.Tensor) -> torch.Tensor:
        inference.masks[str(stride)](maps)  # which takes its time
        step = inference.settings.tile * inference.strides[0] // stride
        if step < 1 or stride != inference.strides[1]:
            return maps.new_full((len(maps), 1, *maps.shape[-2:]), 10.)
        height, width = maps.shape[-2:]
        tiles = random_tiles(-(-height // step), -(-width // step), share)
        keep = tiles.repeat_interleave(step, 2).repeat_interleave(step, 3)
        return 20. * keep[..., :height, :width].expand(len(maps), -1, -1, -1) - 10
    inference.masks.logits = logits


@torch.no_grad()
def time_detectors(models: Sequence[nn.Module], args: argparse.Namespace) -> Dict[str, float]:
    """Time whole detectors without post-processing."""
    coarse, dense, pruned = models
    inference, image = find_inference(pruned), random_image(dense, (3, args.size, args.size))

    def run_pruned(share: float) -> None:
        keep_random_tiles(inference, share)
        with inference.pruning():
            pruned(image, mode='tensor')

    functions = {'strides 8 to 32': lambda: coarse(image, mode='tensor'),
                 'strides 4 to 32, dense': lambda: dense(image, mode='tensor')}
    for share in args.shares:
        functions[f'pruned, {share:.0%}'] = lambda share=share: run_pruned(share)
    return interleaved(functions, args.runs)


def fit_masks(model: nn.Module, cfg: Config, steps: int) -> None:
    """Fit the masks alone to the features of training images, by Adam on all of them at once."""
    inference, seen = find_inference(model), []
    levels = len(inference.strides)
    with torch.no_grad():
        for batch in calibration_batches(cfg, model.eval(), 1000):
            seen.append((model.extract_feat(batch.images)[1:levels],
                         batch_boxes(batch.data_samples)))
    optimizer = torch.optim.Adam(inference.masks.parameters(), lr=0.01)
    for _ in range(steps):
        loss = sum(mask_loss([inference.masks.logits(stride, map_) for stride, map_ in
                              zip(inference.strides[1:], maps)], boxes, inference.strides,
                             inference.settings) for maps, boxes in seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def load_with_masks(args: argparse.Namespace) -> Tuple[nn.Module, Config]:
    """Load the detector to be measured, with masks."""
    cfg = load_config(args.config)
    if cfg.model.type != 'mmgcp.SpatialPruner':
        cfg.model = dict(cfg.model, type='mmgcp.SpatialPruner', detector_type=cfg.model.type,
                         spatial_cfg=dict(levels=args.levels))
    torch.manual_seed(0)
    model = build_detector(cfg)
    load_strictly(model, args.checkpoint, args.config)
    size = args.size or image_size(cfg)[0]
    if args.fit_masks:
        source = [args.train] if args.train else None
        fit_masks(model, with_training_data(cfg, source, size, 8, False), args.fit_masks)
    return model.eval(), with_test_data(cfg, args.val, size, 8)


def measure_by_tau(args: argparse.Namespace) -> None:
    """Print accuracy and shares of a detector by tau."""
    model, cfg = load_with_masks(args)
    inference, predict, rows = find_inference(model), model.predict, []
    for tau in args.taus:
        inference.settings = replace(inference.settings, tau=tau)
        found: List[Tuple[float, float, float]] = []

        def counted(*inputs, found=found, **kwargs):
            start = time.process_time()
            samples = predict(*inputs, **kwargs)
            milliseconds = 1000 * (time.process_time() - start) / len(samples)
            stride = inference.strides[0]
            found.append((inference.kept[stride], inference.computed[stride], milliseconds))
            return samples

        model.predict = counted
        metric, value = evaluate(model, cfg, args.metric)
        kept, computed, milliseconds = (statistics.mean(values) for values in zip(*found))
        rows.append([f'{tau:g}', f'{value:.3f}', f'{kept:.1%}', f'{computed:.1%}',
                     f'{milliseconds:.1f}'])
        print(rows[-1], flush=True)
    header = ['tau', metric, 'cells kept', 'tiles computed', 'ms']
    print('\n'.join(_markdown([header, *rows])))


def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(1)
    print(describe_machine(threads=1))
    if args.config:
        measure_by_tau(args)
        return
    args.size = args.size or 640
    for name in args.detectors:
        torch.manual_seed(0)
        models = [build_detector(load_config(str(ROOT / 'configs' / path))).eval()
                  for path in CONFIGS[name]]
        for what, found in (('layers of the finest level', time_layers(models[2], args)),
                            ('whole detector', time_detectors(models, args))):
            base = found.get('dense') or found['strides 4 to 32, dense']
            rows = [[kind, f'{value:.1f}', f'{base / value:.2f}']
                    for kind, value in found.items()]
            print(f'\n{name}, {what}, {args.size} x {args.size}:\n')
            print('\n'.join(_markdown([['', 'ms', 'times as fast as dense'], *rows])))


if __name__ == '__main__':
    run_tool(main)
