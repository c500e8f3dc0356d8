# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing networks whose numbers of channels follow no widen_factor."""
import pytest
import torch
import torch.nn as nn
from darknet_samples import SIZE, build, tiny_config, write_darknet
from opencv_darknet import assert_agrees, needs_opencv_4

from mmgcp.darknet import DarknetError, channel_table, check_model, darknet_sections
from mmgcp.pruning.blocks import remove_blocks


def keep_outputs(module, indices):
    conv, norm = module.conv, module.bn
    conv.weight = nn.Parameter(conv.weight[indices].detach().clone())
    for name in ('weight', 'bias'):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[indices].detach().clone()))
    for name in ('running_mean', 'running_var'):
        setattr(norm, name, getattr(norm, name)[indices].clone())


def keep_inputs(conv, indices):
    conv.weight = nn.Parameter(conv.weight[:, indices].detach().clone())


def prune(model):
    """Prune a short path, a residual group and a convolution before a prediction."""
    csp = model.backbone.stage3[1]
    width = csp.short_conv.conv.weight.shape[0]
    keep_outputs(csp.short_conv, list(range(width - 5)))
    keep_inputs(csp.final_conv.conv, list(range(2 * width - 5)))
    coupled = [0, 3, 4, 7, 8, 9, 11]
    keep_outputs(csp.main_conv, coupled)
    for block in csp.blocks:
        keep_inputs(block.conv1.conv, coupled)
        keep_outputs(block.conv2, coupled)
    keep_inputs(csp.post_conv.conv, coupled)
    bridge = model.bbox_head.head_module.convs_bridge[1]
    keep_outputs(bridge, list(range(3, 30)))
    keep_inputs(model.bbox_head.head_module.convs_pred[1], list(range(3, 30)))
    return model


@needs_opencv_4
def test_pruned_network(tmp_path):
    model = prune(build(tiny_config(1e-3), seed=3))
    check_model(model)
    channels = channel_table(darknet_sections(model, SIZE))
    assert channels['backbone.stage3.1.main_conv'][1] == 7
    assert channels['bbox_head.head_module.convs_pred.1'] == (27, 24)
    assert_agrees(model, *write_darknet(model, tmp_path))


@needs_opencv_4
def test_bias_before_the_norm(tmp_path):
    model = build(tiny_config(), seed=4)
    conv = model.backbone.stage2[0].conv
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.weight.shape[0]))
    check_model(model)
    assert_agrees(model, *write_darknet(model, tmp_path))


def test_channels_that_do_not_fit():
    model = build(tiny_config())
    keep_inputs(model.backbone.stage1[1].post_conv.conv, [0, 1, 2])
    with pytest.raises(DarknetError, match='post_conv takes 3 channels, but gets 8'):
        darknet_sections(model, SIZE)


def _set_activation(model):
    model.neck.downsample_layers[0].activate = nn.ReLU()


def _set_pooling(model):
    model.neck.reduce_layers[2].poolings[0].kernel_size = 3


def _add_layer(model):
    model.neck.out_layers[1] = nn.Conv2d(1, 1, 1)


def _set_groups(model):
    model.backbone.stage1[0].conv.groups = 2


@pytest.mark.parametrize('change, message', [
    (_set_activation, r'neck.downsample_layers.0 has the activation ReLU\(\)'),
    (_set_pooling, r'it pools over \(3, 9, 13\)'),
    (_add_layer, 'it has a parameter neck.out_layers.1.bias'),
    (_set_groups, 'backbone.stage1.0 has groups'),
    (lambda model: setattr(model, 'neck', nn.Identity()), 'its neck is a Identity'),
])
def test_model_that_is_not_yolov4(change, message):
    model = build(tiny_config())
    change(model)
    with pytest.raises(DarknetError, match=message):
        check_model(model)


def test_a_removed_block():
    model = build(tiny_config())
    remove_blocks(model, {'backbone.stage3.1.blocks.0': None})
    with pytest.raises(DarknetError, match=r'backbone.stage3.1.blocks.0 has been removed by'):
        check_model(model)
