# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch.nn as nn
import torch.nn.functional as F
from older_stacks import config_or_skip
from pruning_samples import Block, Toy
from yolov4_samples import build, yolov4

from mmgcp.errors import PruningError
from mmgcp.pruning.layer_groups import assign_groups, auto_groups
from mmgcp.pruning.units import LayerGroup
from mmgcp.utils.config import build_detector

LAYER_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm)
SHAPE = (3, 64, 64)
YOLO_NECK = {
    'top-down-8': ['neck.reduce_layers.0', 'neck.top_down_layers.1'],
    'top-down-16': ['neck.reduce_layers.1', 'neck.upsample_layers.1', 'neck.top_down_layers.0'],
    'top-down-32': ['neck.reduce_layers.2', 'neck.upsample_layers.0'],
    'bottom-up-16': ['neck.downsample_layers.0', 'neck.bottom_up_layers.0'],
    'bottom-up-32': ['neck.downsample_layers.1', 'neck.bottom_up_layers.1'],
}


def yolo_head(*lists):
    return {f'head-{8 * 2**level}': [f'bbox_head.head_module.{name}.{level}' for name in lists]
            for level in range(3)}


def backbone(first, *names):
    """The stages by stride, each with half the resolution of the one before."""
    return {f'backbone-{first * 2**index}': [f'backbone.{name}'] if isinstance(name, str) else
            [f'backbone.{part}' for part in name] for index, name in enumerate(names)}


def load(path, **options):
    cfg = config_or_skip(path, {f'model.{key.replace("__", ".")}': value
                                for key, value in options.items()})
    return build_detector(cfg)


def group_of_layers(model, input_shape=SHAPE):
    """Name of the group by layer; checks that each layer is in exactly one."""
    groups = auto_groups(model, input_shape)
    listed = [name for group in groups for name in group.modules]
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(layers)
    assert all(group.ratio is None and group.threshold is None for group in groups)
    found = {name: group.name for name, group in assign_groups(model, layers, groups).items()}
    assert set(found) == set(layers)
    return found


def check(model, expected, input_shape=SHAPE):
    """Compare with groups by hand, as patterns by name, in their order."""
    found = group_of_layers(model, input_shape)
    assert [group.name for group in auto_groups(model, input_shape)] == list(expected)
    modules = dict(model.named_modules())
    by_hand = [LayerGroup(name, [pattern for pattern in patterns if pattern in modules])
               for name, patterns in expected.items()]
    owners = assign_groups(model, found, by_hand)
    assert found == {layer: group.name for layer, group in owners.items()}


def test_yolov4():
    stages = backbone(1, 'stem', 'stage1', 'stage2', 'stage3', 'stage4', 'stage5')
    check(build(yolov4()), {**stages, **YOLO_NECK, **yolo_head('convs_bridge', 'convs_pred')})


@pytest.mark.parametrize('path, expected', [
    ('yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py', {
        **backbone(2, 'stem', 'stage1', 'stage2', 'stage3', 'stage4'),
        **YOLO_NECK,
        **yolo_head('convs_pred')}),
    ('yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', {
        **backbone(2, 'stem', 'stage1', 'stage2', 'stage3', 'stage4'),
        # nothing but identities reduces and upsamples
        **{name: patterns for name, patterns in YOLO_NECK.items() if name != 'top-down-32'},
        **yolo_head('cls_preds', 'reg_preds')}),
    # The head's squeeze-excitation runs before the convolution whose input it weights
    ('ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py', {
        **backbone(2, 'stem', 'stage1', 'stage2', 'stage3', 'stage4'),
        **YOLO_NECK,
        **yolo_head('cls_stems', 'reg_stems', 'cls_preds', 'reg_preds')}),
])
def test_mmyolo(path, expected):
    factor = dict(backbone__widen_factor=0.125, neck__widen_factor=0.125,
                  bbox_head__head_module__widen_factor=0.125)
    check(load(f'mmyolo::{path}', **factor), expected)


def test_mmyolo_layers_that_run_in_train_mode_only():
    model = load('mmyolo::yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py',
                 backbone__widen_factor=0.125, neck__widen_factor=0.125,
                 bbox_head__head_module__widen_factor=0.125)
    found = group_of_layers(model, (3, 128, 128))
    for level in range(4):
        prefix = 'bbox_head.head_module'
        assert found[f'{prefix}.main_convs_pred.{level}.2'] == f'head-{8 * 2**level}'
        assert found[f'{prefix}.aux_convs_pred.{level}.1'] == 'head'


def test_upsampling_may_hold_a_downsampling():
    model = load('mmyolo::yolov6/yolov6_v3_n_syncbn_fast_8xb32-300e_coco.py')
    found = group_of_layers(model)
    assert found['neck.upsample_layers.0.downsample.conv'] == 'top-down-16'
    assert found['neck.upsample_layers.0.upsample'] == 'top-down-16'
    assert found['neck.downsample_layers.0.conv'] == 'bottom-up-16'


def test_retinanet():
    model = load('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', backbone__init_cfg=None,
                 backbone__base_channels=8, neck__in_channels=[8, 16, 32, 64],
                 neck__out_channels=8, bbox_head__in_channels=8, bbox_head__feat_channels=8,
                 bbox_head__num_classes=3)
    levels = {f'top-down-{8 * 2**level}': [f'neck.lateral_convs.{level}',
                                           f'neck.fpn_convs.{level}'] for level in range(5)}
    stages = backbone(2, ('conv1', 'bn1'), 'layer1', 'layer2', 'layer3', 'layer4')
    check(model, {**stages, **levels, 'head': ['bbox_head']}, (3, 256, 256))


@pytest.mark.parametrize('name, kind', [
    ('backbone.downsample_layers', 'backbone'),
    ('neck.top_down_layers', 'top-down'),
    ('neck.lateral_convs', 'top-down'),
    ('neck.detect1', 'top-down'),
    ('neck.upsample_layers.downsample', 'top-down'),
    ('neck.reduce_layers.out_conv', 'top-down'),
    ('neck.0.fpn_convs', 'top-down'),
    ('neck.0.pafpn_convs', 'bottom-up'),
    ('neck.downsamples', 'bottom-up'),
    ('neck.bottom_up_blocks', 'bottom-up'),
    ('neck.out_convs', 'bottom-up'),
    ('neck.extra_layers', 'bottom-up'),
    ('mask_head.downsample_convs', 'head'),
])
def test_kind(name, kind):
    first, *parts = name.split('.')
    layer = nn.Conv2d(3, 4, 1)
    for part in reversed(parts):
        layer = nn.ModuleDict({part: layer})
    model = Toy(lambda net, x: net.get_submodule(name)(x), **{first: layer})
    assert group_of_layers(model) == {name: f'{kind}-1'}


def test_layers_of_all_types_have_the_stride_of_their_own_output():
    neck = nn.ModuleDict(dict(
        up=nn.ConvTranspose2d(8, 8, 2, 2), norm=nn.GroupNorm(2, 8), pred=nn.Linear(8, 2)))

    def run(net, x):
        x = net.neck['norm'](net.neck['up'](net.backbone(x)))
        return net.neck['pred'](x.mean((2, 3)))

    model = Toy(run, backbone=nn.Sequential(Block(3, 8, 3, stride=2), Block(8, 8, 3, stride=2)),
                neck=neck)
    assert group_of_layers(model) == {
        'backbone.0.conv': 'backbone-2', 'backbone.0.bn': 'backbone-2',
        'backbone.1.conv': 'backbone-4', 'backbone.1.bn': 'backbone-4',
        'neck.up': 'top-down-2', 'neck.norm': 'top-down-2', 'neck.pred': 'top-down-2'}


def test_stride_is_rounded():
    """The maps of an image of 300 pixels are 150, 75 and 38 high."""
    model = Toy(lambda net, x: net.backbone(x),
                backbone=nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3))))
    assert group_of_layers(model, (3, 300, 100)) == {
        'backbone.0': 'backbone-2', 'backbone.1': 'backbone-4', 'backbone.2': 'backbone-8'}


class Attention(nn.Module):
    """Squeeze-excitation."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Linear(4, 4)
        self.excite = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        squeezed = F.relu(self.squeeze(x.mean((2, 3))))
        return x * self.excite(squeezed[..., None, None]).sigmoid()


def test_pooled_maps_have_the_stride_of_the_layer_before():
    model = Toy(lambda net, x: net.backbone(x), backbone=nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), Attention()),
        nn.Conv2d(4, 4, 3, 2, 1), Attention()))
    found = group_of_layers(model)
    for layer in ('squeeze', 'excite'):
        assert found[f'backbone.0.2.{layer}'] == 'backbone-4'
        assert found[f'backbone.2.{layer}'] == 'backbone-8'


def test_pooled_maps_belong_to_the_module_around_them():
    """The weights of both levels are computed before either is convolved."""
    convs = nn.ModuleList(nn.ModuleDict(dict(weight=nn.Conv2d(4, 4, 1), conv=nn.Conv2d(4, 4, 1)))
                          for _ in range(2))

    def run(net, x):
        maps = [net.backbone[0](x)]
        maps.append(net.backbone[1](maps[0]))
        weights = [level['weight'](x.mean((2, 3), True)) for level, x in zip(net.bbox_head, maps)]
        return [level['conv'](x * weight)
                for level, x, weight in zip(net.bbox_head, maps, weights)]

    model = Toy(run, bbox_head=convs, backbone=nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)))
    found = group_of_layers(model)
    for level, name in enumerate(('head-2', 'head-4')):
        assert found[f'bbox_head.{level}.weight'] == found[f'bbox_head.{level}.conv'] == name


def test_layers_without_a_map_anywhere():
    model = Toy(lambda net, x: net.backbone(x.mean((2, 3))), backbone=nn.Linear(3, 4))
    assert group_of_layers(model) == {'backbone': 'backbone'}


def test_shared_layers():
    """A head shared by two levels, with normalisation of each level and attention."""
    def run(net, x):
        maps = [net.backbone[0](x)]
        maps.append(net.backbone[1](maps[0]))
        head = net.bbox_head
        return [norm(head['conv'](head['attention'](head['twice'](head['twice'](x)) if level
                                                    else x)))
                for level, (x, norm) in enumerate(zip(maps, head['norms']))]

    head = nn.ModuleDict(dict(
        attention=Attention(), conv=nn.Conv2d(4, 4, 1), twice=nn.Conv2d(4, 4, 1),
        norms=nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])))
    model = Toy(run, bbox_head=head, backbone=nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)))
    assert group_of_layers(model) == {
        'backbone.0': 'backbone-2', 'backbone.1': 'backbone-4', 'bbox_head.twice': 'head-4',
        'bbox_head.norms.0': 'head-2', 'bbox_head.norms.1': 'head-4', 'bbox_head.conv': 'head',
        'bbox_head.attention.squeeze': 'head', 'bbox_head.attention.excite': 'head'}
    assert [group.name for group in auto_groups(model, SHAPE)] == [
        'backbone-2', 'backbone-4', 'head-2', 'head-4', 'head']


def test_two_stages():
    """Regions have no stride, and neither do layers that the levels share."""
    model = load('mmdet::pafpn/faster-rcnn_r50_pafpn_1x_coco.py', backbone__init_cfg=None,
                 backbone__depth=18, backbone__base_channels=8, neck__in_channels=[8, 16, 32, 64],
                 neck__out_channels=8, rpn_head__in_channels=8, rpn_head__feat_channels=8,
                 roi_head__bbox_head__in_channels=8, roi_head__bbox_head__fc_out_channels=8,
                 roi_head__bbox_roi_extractor__out_channels=8)
    stages = backbone(2, ('conv1', 'bn1'), 'layer1', 'layer2', 'layer3', 'layer4')
    top_down = {f'top-down-{4 * 2**level}': [f'neck.lateral_convs.{level}',
                                             f'neck.fpn_convs.{level}'] for level in range(4)}
    bottom_up = {f'bottom-up-{8 * 2**level}': [f'neck.downsample_convs.{level}',
                                               f'neck.pafpn_convs.{level}'] for level in range(3)}
    check(model, {**stages, **top_down, **bottom_up, 'head': ['rpn_head', 'roi_head']})


def test_regions_have_no_stride():
    def run(net, x):
        x = net.backbone(x)
        return net.roi_head['fc'](net.roi_head['conv'](x[:, :, :7, :7]).mean((2, 3)))

    model = Toy(run, backbone=nn.Conv2d(3, 4, 3, 2, 1),
                roi_head=nn.ModuleDict(dict(conv=nn.Conv2d(4, 4, 1), fc=nn.Linear(4, 2))))
    assert group_of_layers(model) == {
        'backbone': 'backbone-2', 'roi_head.conv': 'head', 'roi_head.fc': 'head'}


def test_linear_layers_see_no_map():
    """Here the last but one dimension counts windows."""
    model = Toy(lambda net, x: net.backbone[1](net.backbone[0](x).view(1, 4, 16, 64)),
                backbone=nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 4)))
    assert group_of_layers(model) == {'backbone.0': 'backbone-2', 'backbone.1': 'backbone-2'}


def test_layers_that_do_not_run():
    model = Toy(lambda net, x: net.bbox_head['main'](net.backbone[1](net.backbone[0](x))),
                backbone=nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), Block(4, 4, 3, stride=2),
                                        Block(4, 4)]),
                neck=nn.ModuleDict(dict(lateral_convs=Block(4, 4), downsamples=Block(4, 4))),
                bbox_head=nn.ModuleDict(dict(main=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 2, 1))))
    found = group_of_layers(model)
    assert found['backbone.2.conv'] == found['backbone.2.bn'] == 'backbone-2'
    assert found['neck.lateral_convs.conv'] == 'top-down'
    assert found['neck.downsamples.bn'] == 'bottom-up'
    assert found['bbox_head.main'] == 'head-4'
    assert found['bbox_head.aux'] == 'head'


def test_layer_inside_of_a_layer():
    """It belongs to the layer that contains it, as with patterns."""
    layer = nn.Conv2d(3, 4, 3, 2, 1)
    layer.aux = nn.Conv2d(4, 4, 3, 2, 1)
    model = Toy(lambda net, x: net.backbone.aux(net.backbone(x)), backbone=layer)
    assert group_of_layers(model) == {'backbone': 'backbone-2', 'backbone.aux': 'backbone-2'}


def state(model):
    return ([module.training for module in model.modules()],
            [param.requires_grad for param in model.parameters()],
            [len(module._forward_hooks) for module in model.modules()],
            {name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_model_stays_as_it_was():
    model = build(yolov4(frozen_stages=1))
    model.train()
    model.neck.eval()
    model.requires_grad_(True)
    before = state(model)
    auto_groups(model, SHAPE)
    after = state(model)
    assert before[:3] == after[:3]
    assert all(tensor.equal(after[3][name]) for name, tensor in before[3].items())


def test_model_that_does_not_run():
    model = Toy(lambda net, x: net.bbox_head(net.backbone(x)),
                backbone=Block(3, 4), bbox_head=nn.Conv2d(5, 2, 1))
    before = state(model)
    with pytest.raises(PruningError, match='strides.* as the model does not run: RuntimeError'):
        auto_groups(model, SHAPE)
    assert before[:3] == state(model)[:3]
