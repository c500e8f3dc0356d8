# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch.nn as nn
from mmengine.config import Config
from pruning_samples import GROUPS, Block, Toy

from mmgcp.errors import PruningError
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.units import LayerGroup


@pytest.fixture
def toy():
    return Toy(lambda net, x: x, stem=Block(3, 4), stage1=nn.Sequential(Block(4, 4), Block(4, 4)),
               stage10=Block(4, 4))


def assigned(model, layers, **groups):
    found = assign_groups(model, layers, [LayerGroup(*item) for item in groups.items()])
    return {layer: group.name for layer, group in found.items()}


def test_pattern_stands_for_everything_inside(toy):
    layers = ['stem.bn', 'stage1.0.bn', 'stage1.1.bn', 'stage10.bn']
    assert assigned(toy, layers, a=['stage1'], b=['stem', 'stage10.b?']) == {
        'stage1.0.bn': 'a', 'stage1.1.bn': 'a', 'stem.bn': 'b', 'stage10.bn': 'b'}


def test_layers_in_no_group_are_absent(toy):
    assert assigned(toy, ['stem.bn', 'stage10.bn'], a=['stage1[0]']) == {'stage10.bn': 'a'}


def test_layer_in_two_groups(toy):
    with pytest.raises(PruningError, match=r"'stage1.0.bn' is in two layer groups: 'a' and 'b'"):
        assigned(toy, ['stage1.0.bn'], a=['stage1'], b=['*.0.bn'])


def test_two_patterns_of_one_group_may_overlap(toy):
    assert assigned(toy, ['stage1.0.bn'], a=['stage1', '*.0.bn']) == {'stage1.0.bn': 'a'}


def test_pattern_that_matches_nothing(toy):
    with pytest.raises(PruningError, match=r"'stage2' of layer group 'a' matches no module"):
        assigned(toy, ['stem.bn'], a=['stem', 'stage2'])


def test_same_name_twice(toy):
    groups = [LayerGroup('a', ('stem', )), LayerGroup('a', ('stage1', ))]
    with pytest.raises(PruningError, match='same name'):
        assign_groups(toy, ['stem.bn'], groups)


def test_yolov4_groups_by_hand(model):
    norms = [name for name, module in model.named_modules()
             if isinstance(module, nn.BatchNorm2d)]
    config = Path(__file__).parents[2] / 'configs/_base_/prune/yolov4_groups.py'
    declared = Config.fromfile(config).prune_cfg.to_dict()['groups']
    assert declared == GROUPS
    found = assign_groups(model, norms, [LayerGroup(**group) for group in declared])
    assert set(found) == set(norms)
    for layer, name in (('backbone.stem.bn', 'stride-8'),
                        ('backbone.stage3.1.blocks.0.conv2.bn', 'stride-8'),
                        ('backbone.stage4.0.bn', 'stride-16'),
                        ('neck.reduce_layers.2.post_convs.1.bn', 'stride-32'),
                        ('neck.reduce_layers.0.bn', 'top-down'),
                        ('neck.upsample_layers.1.0.bn', 'top-down'),
                        ('neck.bottom_up_layers.1.4.bn', 'bottom-up'),
                        ('bbox_head.head_module.convs_bridge.2.bn', 'bottom-up')):
        assert found[layer].name == name


@pytest.mark.parametrize('options, message', [
    (dict(ratio=0.5, threshold=0.1), 'both a ratio and a threshold'),
    (dict(ratio=1.), r'must be in \[0, 1\), but is 1.0'),
    (dict(ratio=-0.1), 'but is -0.1'),
])
def test_group_that_makes_no_sense(options, message):
    with pytest.raises(PruningError, match=message):
        LayerGroup('a', ('stem', ), **options)
