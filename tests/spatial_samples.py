# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Narrow detectors with a level of stride 4, with and without spatial pruning."""
import torch
from pruning_samples import randomise
from scripts import ROOT

from mmgcp.spatial import find_inference
from mmgcp.utils.config import build_detector, load_config

CONFIGS = dict(yolov4=ROOT / 'configs/yolov4/yolov4_n-p2_fast_1xb8-60e_voc-320.py',
               yolov5=ROOT / 'configs/yolov5/yolov5_n-v61-p2_fast_1xb16-60e_voc-320.py')
NARROW = {f'model.{part}.widen_factor': 0.0625
          for part in ('backbone', 'neck', 'bbox_head.head_module')}


def p2_config(name):
    """The config of a dense detector, made narrow."""
    return load_config(str(CONFIGS[name]), NARROW)


def with_pruner(cfg, **settings):
    """The config of the same detector with spatial pruning; tiles are computed as such."""
    cfg = cfg.copy()
    cfg.model = dict(cfg.model, type='mmgcp.SpatialPruner', detector_type=cfg.model.type,
                     spatial_cfg=dict(dict(dense_above=1.), **settings))
    return cfg


def build(cfg, seed=0):
    """A detector in double precision and eval mode, with random weights; half is kept."""
    model = randomise(build_detector(cfg), seed).double().eval()
    if find_inference(model) is not None:
        keep_half(model)
    return model


@torch.no_grad()
def keep_half(model, seed=0):
    """Let each mask keep half of the cells of an image for tau 0.5."""
    inference, generator = find_inference(model), torch.Generator().manual_seed(seed)
    maps = model.extract_feat(images(2, seed=seed).to(next(model.parameters())))
    for level, stride in enumerate(inference.strides[1:], 1):
        conv = inference.masks[str(stride)]
        conv.weight.normal_(0, 1, generator=generator)
        conv.bias.zero_()
        conv.bias.fill_(1e-4 - conv(maps[level]).median())


@torch.no_grad()
def set_masks(model, keep):
    """Let the masks keep all, or nothing."""
    for conv in find_inference(model).masks.values():
        conv.weight.zero_()
        conv.bias.fill_(1e3 if keep else -1e3)


def images(number=2, height=128, width=192, seed=0):
    """Images of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, height, width, generator=generator, dtype=torch.double)


@torch.no_grad()
def raw(model, inputs):
    """The raw predictions with cells pruned, kind by kind and level by level."""
    with find_inference(model).pruning():
        return model(inputs, mode='tensor')
