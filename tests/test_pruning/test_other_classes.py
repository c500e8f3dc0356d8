# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruned detectors that are trained for other classes than the original."""
import copy

import pytest
import torch
from families import NARROW, compute_loss
from mmengine.runner.checkpoint import load_state_dict
from pruning_samples import randomise, tensors

from mmgcp.errors import PruningError
from mmgcp.nn.forward import run_as_tensors
from mmgcp.pruning import prune
from mmgcp.pruning.detector import make_pruned_config, registered_name
from mmgcp.registry import MODELS
from mmgcp.utils.config import build_detector, load_config, nested_dicts

SIZE = 128
# Path in the package's configs, options, and the ways to its prediction layers of classes
CONFIGS = {
    'yolov5': ('mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py', NARROW),
    'yolov8': ('mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', NARROW),
    'rtmdet': ('mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py', NARROW),
    'ppyoloe': ('mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py', NARROW),
    'retinanet': ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', {}),
    'faster-rcnn': ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
                    {'model.backbone.depth': 18, 'model.neck.in_channels': [64, 128, 256, 512],
                     'model.roi_head.bbox_head.fc_out_channels': 32}),
}


def for_classes(cfg, number):
    cfg = copy.deepcopy(cfg)
    for part in nested_dicts(cfg.model):
        if isinstance(part.get('num_classes'), int):
            part['num_classes'] = number
    return cfg


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@torch.no_grad()
def outputs(model):
    model.eval()
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return [tuple(item.shape) for item in tensors(run_as_tensors(model, image))]


@pytest.mark.parametrize('name', CONFIGS)
def test_other_numbers_of_classes(name):
    path, options = CONFIGS[name]
    cfg = for_classes(load_config(path, {**options, 'model.backbone.init_cfg': None}), 20)
    model = randomise(build_detector(cfg))
    original = copy.deepcopy(model)
    criterion = dict(type='mmgcp.Random', seed=0)
    table = prune(model, ratio=0.5, criterion=criterion, allocation='uniform', compensate=False,
                  input_shape=(3, SIZE, SIZE)).changed_channels
    pruned_cfg = make_pruned_config(cfg, registered_name(type(model)), table)
    assert pruned_cfg.model.original_classes == [20]
    for number in (3, 40):
        plain = build_detector(for_classes(cfg, number))
        other = build_detector(for_classes(pruned_cfg, number))
        # each prediction has the shape that the unpruned detector for these classes has
        assert outputs(other) == outputs(plain) != outputs(original)
        load_state_dict(other, model.state_dict(), strict=False)
        changed = {key for key, shape in shapes(other).items() if shape != shapes(model)[key]}
        assert changed and all(shapes(plain)[key] != shapes(original)[key] for key in changed)
        loss = compute_loss(other, SIZE)
        assert torch.isfinite(loss)
        loss.backward()
        assert [key for key, param in other.named_parameters()
                if param.requires_grad and param.grad is None] == []


def test_hidden_layers_that_depend_on_the_classes():
    """YOLOv8's hidden layers are as wide as there are classes, if they are many."""
    path, options = CONFIGS['yolov8']
    cfg = for_classes(load_config(path, options), 80)
    layer = 'bbox_head.head_module.cls_preds.0.0.conv'
    model = build_detector(cfg)
    assert model.get_submodule(layer).out_channels == 80
    pruned = make_pruned_config(cfg, 'mmyolo.YOLODetector', {
        layer: [None, 70], layer.replace('conv', 'bn'): [70],
        layer.replace('.0.conv', '.1.conv'): [70, None]})
    for number, there in ((80, 70), (3, 70), (160, 70)):
        found = build_detector(for_classes(pruned, number)).get_submodule(layer)
        assert (found.out_channels, len(found.weight)) == (there, 70)
    again = make_pruned_config(for_classes(pruned, 3), 'mmyolo.YOLODetector', {
        'backbone.stem.conv': [None, 7], 'backbone.stem.bn': [7],
        'backbone.stage1.0.conv': [7, None]})  # pruned a second time, now for three classes
    assert again.model.original_classes == [80]
    assert build_detector(again).get_submodule(layer).out_channels == 70
    wrong = copy.deepcopy(pruned)
    wrong.model.channels[layer] = [None, 81]
    with pytest.raises(PruningError, match='asks for .* 81'):  # with the classes that it had
        MODELS.build(wrong.model)
