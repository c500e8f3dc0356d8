# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Whether a device computes what the CPU does, in sparse training, pruning and distilling.

The same weights (random ones) and images go through both:

- a step with ``DynamicSparsityHook``, and one in ``SpatialAttentionDistiller``: the losses, and
  how the weights change; once more with channels last and, on GPUs, in mixed precision, where
  losses only have to be near;
- pruning, by default with ``OBS`` and reconstruction, half of the MACs: the same channels, and
  the same outputs of the pruned network.

Then there is the latency of the network and of the pruned one on that device. It exits with 1
if something differs. Without a GPU, ``--device cpu`` shows that the script runs.
"""
import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

import torch
import torch.nn as nn
from prune_speed import ROOT, _build, _markdown, describe_machine
from train_overhead import TITLES, Training, make_setup

from mmgcp.datasets.calibration import ImagesOf
from mmgcp.deployment.timing import take_turns, torch_run
from mmgcp.nn.forward import flatten_tensors, run_as_tensors
from mmgcp.nn.temporarily import eval_mode, values_kept
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import prune
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import image_size, load_config
from mmgcp.utils.devices import find_device

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py'
TRAININGS = ('subgradient', 'proximal', 'coupled', 'attention', 'cwd', 'response')
# Largest difference, as a share of the largest number, in double, single and mixed precision
EXACT, SINGLE, MIXED = 1e-5, 1e-2, 5e-2
KINDS = {'': EXACT, 'channels last': EXACT, 'mixed precision': MIXED}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(CONFIG),
                        help='config of a detector of MMYOLO; default: the small YOLOv4')
    parser.add_argument('--student', help=argparse.SUPPRESS)
    parser.add_argument('--device', help='default: the GPU if there is one')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--size', type=int,
                        help="width and height of the images; default: the config's")
    return parser.parse_args()


class CheckedTraining(Training):
    """A step that changes the weights.

    Args:
        variant (str): What is trained; see :class:`Training`.
        setup (dict): What :func:`make_setup` returned.
        kind (str): A key of :data:`KINDS`.
    """

    def __init__(self, variant: str, setup: dict, kind: str = ''):
        self.kind = kind
        torch.manual_seed(0)
        super().__init__(variant, setup)
        generator = torch.Generator().manual_seed(1)
        for name, param in self.model.named_parameters():
            if 'distill_adapters' in name:  # whose random initialisation is made on the device
                param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))
        if kind != 'mixed precision':  # rounding tells nothing: narrow random networks amplify it
            self.model.double()
            self.images = self.images.double()
        if kind == 'channels last':
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    def _build_optim_wrapper(self):
        from mmengine.optim import AmpOptimWrapper, OptimWrapper
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        if self.kind != 'mixed precision':
            return OptimWrapper(optimizer)
        return AmpOptimWrapper(optimizer=optimizer, loss_scale=1024.)

    def results(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Make a step; returns the loss (1, ) before it, and the changes of all weights (N, )."""
        with torch.no_grad(), values_kept(self.model.buffers()), \
                self.optim_wrapper.optim_context(self.model):
            losses = self.model(self.images, self._samples(), mode='loss')
        loss = self.model.parse_losses(losses)[0]
        before = self._weights()
        self.run(1)
        return loss.reshape(1).float().cpu(), self._weights() - before

    def _weights(self) -> torch.Tensor:
        return torch.cat([param.detach().flatten().double().cpu()
                          for param in self.model.parameters()])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((first - second).abs().max() / second.abs().max().clamp(min=1e-12))


def check_trainings(setup: dict, device: str) -> List[list]:
    """Compare trainings on the device with those on the CPU; returns rows of the table."""
    rows = []
    for variant in TRAININGS:
        loss, weights = CheckedTraining(variant, dict(setup, device='cpu')).results()
        for kind, bound in KINDS.items():
            if kind == 'mixed precision' and not device.startswith('cuda'):
                continue  # MMEngine's is for GPUs
            found = CheckedTraining(variant, dict(setup, device=device), kind).results()
            errors = [difference(found[0], loss)]
            if kind != 'mixed precision':
                errors.append(difference(found[1], weights))
            rows.append([', '.join(filter(None, (TITLES[variant].strip('+ '), kind))),
                         max(errors), bound])
            print(f'{rows[-1][0]}: {max(errors):.1e}', file=sys.stderr, flush=True)
    return rows


def prune_on(device: str, setup: dict, model: nn.Module) -> tuple:
    """Prune a copy of a model; returns it, its plan, and its outputs on the CPU."""
    model = copy.deepcopy(model).to(device)
    shape = (3, setup['size'], setup['size'])
    training = Training('plain', dict(setup, device=device))
    batches = [Batch(training.images, training._samples())]
    result = prune(model, target_flops=0.5, batches=batches, calibration=ImagesOf(batches),
                   criterion=dict(type='mmgcp.OBS'), allocation='uniform', input_shape=shape)
    with torch.no_grad(), eval_mode(result.model):
        outputs = flatten_tensors(run_as_tensors(result.model, training.images))
    return result.model, result.plan, torch.cat([item.flatten().cpu() for item in outputs])


def main():
    args = parse_args()
    device = str(find_device(args.device))
    cfg = load_config(args.config)
    args.size, args.pairs, args.iterations, args.threads = (
        args.size or image_size(cfg)[0], 1, 1, torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        args.device = 'cpu'
        setup = make_setup(args, cfg, Path(folder))
        rows = check_trainings(setup, device)
        torch.manual_seed(0)
        model = _build(cfg)
        (_, plan, outputs), (pruned, found_plan, found) = (
            prune_on(name, setup, model) for name in ('cpu', device))
    same = sum(len(set(a.removed) & set(b.removed)) for a, b in zip(plan.units, found_plan.units))
    most = max(sum(len(item.removed) for item in each.units) for each in (plan, found_plan))
    rows.append(['pruning, channels', 1 - same / most, 0.])
    rows.append(['pruning, outputs', difference(found, outputs), SINGLE])
    print(f'{args.config}, {args.size} pixels, {device}; {describe_machine(args.threads)}')
    print(*_markdown([['', 'difference', 'allowed']] + [
        [title, f'{error:.1e}', f'{bound:.0e}'] for title, error, bound in rows]), sep='\n')
    shape = (3, args.size, args.size)
    networks = dict(zip(('not pruned', 'pruned'), (model, pruned)))
    taken = take_turns([torch_run(item.to(device).eval(), shape, args.threads)
                        for item in networks.values()], clock=time.perf_counter)
    times: Dict[str, float] = dict(zip(networks, map(statistics.median, taken)))
    print('\nlatency of one image, ms: ' + ', '.join(
        f'{name} {value:.2f}' for name, value in times.items()))
    if not all(error <= bound for _, error, bound in rows):  # not for NaN either
        sys.exit('something differs')


if __name__ == '__main__':
    run_tool(main)
