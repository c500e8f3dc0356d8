# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A tiny YOLOv4 with random weights and statistics, and its files."""
from yolov4_samples import build as build_random
from yolov4_samples import yolov4

from mmgcp.darknet import Header, darknet_parameters, darknet_sections, format_cfg, write_weights

READ, WRITE = (f'model_converters/{name}.py' for name in ('darknet_to_mmgcp', 'mmgcp_to_darknet'))
SIZE = (96, 64)  # width, height


def tiny_config(eps=1e-5, **kwargs):
    """Config of a small YOLOv4 with Darknet's normalisation."""
    return yolov4(norm_cfg=dict(type='BN', momentum=0.03, eps=eps), **kwargs)


def build(config, seed=0):
    """Build it in eval mode, with random weights and statistics."""
    return build_random(config, seed).eval()


def write_darknet(model, folder, size=SIZE):
    sections = darknet_sections(model, size)
    (folder / 'net.cfg').write_text(format_cfg(sections))
    write_weights(folder / 'net.weights', Header(seen=7), darknet_parameters(model))
    return folder / 'net.cfg', folder / 'net.weights'
