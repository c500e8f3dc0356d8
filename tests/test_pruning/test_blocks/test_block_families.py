# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Blocks of every family: found, removed exactly, rebuilt from a config, pruned together."""
import copy

import pytest
import torch
from families import FAMILIES, compute_loss, family_config
from mmengine.config import Config
from pruning_samples import randomise, tensors
from tiers import slow_except
from yolov4_samples import build, yolov4

from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning.blocks import find_blocks, remove_blocks
from mmgcp.pruning.channel_table import changed_sides, count_channels
from mmgcp.pruning.detector import make_pruned_config, registered_name
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import remove_channels
from mmgcp.utils.config import build_detector, load_config

SIZE = 128
# Residual blocks of each family; others have plain ones
RESIDUAL = {
    'yolov5-n': 7, 'yolov5-n-p6': 8, 'yolov5u-n': 7, 'yolov6-n': 0, 'yolov6-m': 24,
    'yolov6-l': 45, 'yolov6-v3-n': 0, 'yolov6-v3-m': 24, 'yolov6-v3-l': 45, 'yolov7-tiny': 0,
    'yolov7-l': 0, 'yolov7-x': 0, 'yolov7-w-p6': 0, 'yolov7-d-p6': 0, 'yolov7-e2e-p6': 0,
    'yolov8-n': 6, 'yolox-nano': 7, 'yolox-tiny': 7, 'rtmdet-tiny': 3, 'rtmdet-ins-s': 5,
    'ppyoloe-s': 6, 'ppyoloe-plus-s': 6, 'ssdlite': 10, 'yolov3': 23, 'retinanet-r50': 12,
    'fcos-r50': 12, 'faster-rcnn-r50': 12, 'yolov4': 9,
}
NAMES = [name for name in (*FAMILIES, 'yolov4') if name in RESIDUAL]
FAST = ['yolov5-n', 'yolov6-l', 'yolov7-tiny', 'yolov8-n', 'rtmdet-tiny', 'ppyoloe-plus-s',
        'yolov4']


def config_of(name):
    return Config(dict(model=yolov4())) if name == 'yolov4' else family_config(name)


def sample(name):
    """A detector in double precision with random weights, scales of shortcuts included."""
    model = randomise(build(yolov4()) if name == 'yolov4' else build_detector(family_config(name)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.numel() == 1:
                param.uniform_(0.5, 1.5, generator=generator)
    return model.double()


@torch.no_grad()
def outputs(model):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).double()
    with eval_mode(model):
        return tensors(run_as_tensors(model, image))


def outputs_without(model, blocks):
    """Set the ends of branches to zero; plain blocks emit what they read."""
    hooks = {f'{block.name}.{block.branch}': lambda _, output: torch.zeros_like(output)
             for block in blocks if block.kind == 'residual'}
    hooks.update({block.name: lambda inputs, _: inputs.clone()
                  for block in blocks if block.kind == 'plain'})
    with on_outputs(model, hooks):
        return outputs(model)


def largest_difference(expected, found):
    assert [x.shape for x in expected] == [y.shape for y in found]
    return max(float((x - y).abs().max() / (1 + x.abs().max())) for x, y in zip(expected, found))


@pytest.mark.parametrize('name', slow_except(FAST, NAMES, pytest.mark.slow))
def test_blocks_of_family(name, tmp_path):
    original = sample(name)
    blocks = find_blocks(original, (3, SIZE, SIZE))
    residual = [block for block in blocks.found if block.kind == 'residual']
    plain = [block for block in blocks.found if block.kind == 'plain']
    assert len(residual) == RESIDUAL[name]

    chosen = [*residual[::2], *plain[::3]]
    expected = outputs_without(original, chosen)
    assert largest_difference(expected, outputs(original)) > 1e-6
    pruned = copy.deepcopy(original)
    absent = blocks.absent([block.name for block in chosen])
    remove_blocks(pruned, absent)
    assert largest_difference(expected, outputs(pruned)) < 1e-9
    assert set(pruned.state_dict()) < set(original.state_dict())

    shallow = copy.deepcopy(pruned)
    units, _ = find_units(pruned, (3, SIZE, SIZE))
    remove_channels(pruned, units, {unit.name: torch.arange(unit.size)[::3][1:] for unit in units
                                    if unit.conv_groups is None and unit.norm_groups is None})
    table = changed_sides(count_channels(shallow), count_channels(pruned))
    assert table
    cfg = make_pruned_config(config_of(name), registered_name(type(original)), table, absent)
    cfg.dump(tmp_path / 'pruned.py')
    rebuilt = build_detector(load_config(str(tmp_path / 'pruned.py'))).double()
    assert type(rebuilt) is type(original)
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    assert largest_difference(outputs(pruned), outputs(rebuilt)) == 0
    if name == 'rtmdet-ins-s':  # MMYOLO 0.6 has no loss for it
        return
    rebuilt.float()
    compute_loss(rebuilt, SIZE).backward()
    assert [layer for layer, param in rebuilt.named_parameters()
            if param.requires_grad and param.grad is None] == []
