# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import ContextBlock
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdet.models.layers import DropBlock
from mmyolo.models.layers import CSPLayerWithTwoConv
from pruning_samples import Block, Toy, difference, randomise, residual_toy, run
from scripts import run_code
from yolov4_samples import build, yolov4
from zeroing import zero

from mmgcp.errors import PruningError
from mmgcp.nn.layers import channel_counts, find_layer, is_depthwise
from mmgcp.pruning.graph import find_contradiction, find_units
from mmgcp.pruning.surgery import remove_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

SIZE = (3, 16, 16)


def by_name(model, size=SIZE):
    units, skipped = find_units(model, size)
    return {unit.name: unit for unit in units}, skipped


def members(unit, side):
    return sorted(item.module for item in unit.side(side))


def flags(model):
    return ({name: module.training for name, module in model.named_modules()},
            {name: param.requires_grad for name, param in model.named_parameters()})


def hooks(model):
    return [name for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks]


def assert_exact(model, removed, gone, size=SIZE):
    """Removing channels of units is the same as zeroing the named ones, and changes
    the output.

    Args:
        model (nn.Module): The model.
        removed (dict): Channels to remove, by unit.
        gone (dict): The channels that have to go, by name and side of the layer.
        size (tuple): Shape of the image.

    Returns:
        nn.Module: The pruned model.
    """
    randomise(model)
    units, _ = find_units(model, size)
    left = {name: channel_counts(find_layer(model, name)) for name, _ in gone}
    for (name, side), channels in gone.items():
        for number in [0, -1] if is_depthwise(find_layer(model, name)) else [
                0 if side == 'in' else -1]:
            left[name][number] -= len(channels)
    before, expected = run(model, size[1]), run(zero(model, gone), size[1])
    assert difference(before, expected) > 1e-4
    others = {name: value.shape for name, value in model.state_dict().items()}
    remove_channels(model, units, {name: torch.tensor(channels)
                                   for name, channels in removed.items()})
    assert difference(run(model, size[1]), expected) < 1e-9
    assert {name: channel_counts(find_layer(model, name)) for name in left} == left
    for name, value in model.state_dict().items():
        assert value.shape == others[name] or name.startswith(tuple(left))
    return model


def block(name, channels):
    """The outputs of a block, for :func:`assert_exact`."""
    return {(f'{name}.conv', 'out'): channels, (f'{name}.bn', 'out'): channels}


def test_yolov4_shortcuts_are_one_unit(units):
    found = {unit.name: unit for unit in units}
    for stage, blocks in ((3, 3), (4, 3), (5, 1)):
        csp = f'backbone.stage{stage}.1'
        outs = [f'{csp}.main_conv', *(f'{csp}.blocks.{i}.conv2' for i in range(blocks))]
        assert members(found[f'{csp}.main_conv.conv'], 'out') == sorted(
            f'{name}.{part}' for name in outs for part in ('conv', 'bn'))
        ins = [*(f'{csp}.blocks.{i}.conv1' for i in range(blocks)), f'{csp}.post_conv']
        assert members(found[f'{csp}.main_conv.conv'], 'in') == sorted(
            f'{name}.conv' for name in ins)


def test_yolov4_covers_every_convolution_once(original):
    model, units, skipped = original
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    seen = {}
    for unit in units:
        for item in unit.side('out'):
            for channel in item.channels.tolist():
                key = (item.module, channel)
                assert key not in seen
                seen[key] = unit.name
    preds = {f'bbox_head.head_module.convs_pred.{level}' for level in range(3)}
    assert set(skipped) == preds
    assert all('prediction' in reason for reason in skipped.values())
    assert {name for name, _ in seen if name in convs} == convs - preds
    for name in convs - preds:
        assert sum(key[0] == name for key in seen) == model.get_submodule(name).out_channels
    order = [name for name, _ in model.named_modules()]
    assert [x.name for x in units] == sorted((x.name for x in units), key=order.index)


def test_yolov4_pyramid_pooling_repeats_its_input(units):
    found = {unit.name: unit for unit in units}
    unit = found['neck.reduce_layers.2.pre_convs.2.conv']
    (reader, ) = unit.side('in')
    assert reader.module == 'neck.reduce_layers.2.post_convs.0.conv'
    assert unit.size == 64
    # four copies: three poolings and the map itself
    assert sorted(reader.select(unit.mask(torch.tensor([5]))).tolist()) == [5, 69, 133, 197]


def test_concat_offsets():
    model = Toy(lambda net, x: net.pred(torch.cat((net.a(x), net.b(x), net.c(x)), 1)),
                a=Block(3, 4), b=Block(3, 2), c=Block(3, 3), pred=nn.Conv2d(9, 2, 1))
    found, skipped = by_name(model)
    for name, offset in (('a', 0), ('b', 4), ('c', 6)):
        unit = found[f'{name}.conv']
        (reader, ) = unit.side('in')
        assert reader.module == 'pred'
        pairs = sorted(zip(reader.unit_index.tolist(), reader.channels.tolist()))
        assert pairs == [(i, offset + i) for i in range(unit.size)]
        assert members(unit, 'out') == [f'{name}.bn', f'{name}.conv']
    assert list(skipped) == ['pred']


def test_concat_added_to_one_layer():
    model = Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        a=Block(3, 4), b=Block(3, 2), c=Block(3, 6), pred=nn.Conv2d(6, 2, 1))
    found, _ = by_name(model)
    (a_part, ) = [item for item in found['a.conv'].side('out') if item.module == 'c.bn']
    assert a_part.select(torch.ones(4, dtype=torch.bool)).tolist() == [0, 1, 2, 3]
    (c_part, ) = [item for item in found['b.conv'].side('out') if item.module == 'c.bn']
    assert c_part.select(torch.tensor([False, True])).tolist() == [5]
    assert 'c.conv' not in found


def test_residual_toy():
    found, _ = by_name(residual_toy())
    assert set(found) == {'stem.conv', 'a1.conv', 'a2.conv'}
    assert members(found['stem.conv'], 'in') == ['a1.conv', 'a2.conv', 'pred']


def test_prediction_through_reshape_and_shortcut():
    model = Toy(lambda net, x: [(net.p(net.a(x)).permute(0, 2, 3, 1).reshape(2 - 1, -1, 2), ),
                                {'sum': net.b(net.a(x)) + net.c(x)}],
                a=Block(3, 4), b=nn.Conv2d(4, 3, 1), c=nn.Conv2d(3, 3, 1), p=nn.Conv2d(4, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'a.conv'}
    assert set(skipped) == {'b', 'c', 'p'}


def test_shortcut_from_the_image_is_not_pruned():
    model = Toy(lambda net, x: net.pred(net.b(x + net.a(x))),
                a=Block(3, 3), b=Block(3, 4), pred=nn.Conv2d(4, 2, 1))
    found, skipped = by_name(model)
    assert 'a.conv' not in found and 'a.conv' in skipped
    assert 'b.conv' in found


def test_map_that_is_also_an_output_is_not_pruned():
    def run(net, x):
        feature = net.a(x)
        return [feature, net.pred(net.b(feature))]

    model = Toy(run, a=Block(3, 4), b=Block(4, 5), pred=nn.Conv2d(5, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'b.conv'}
    assert 'a.conv' in skipped


def test_frozen_stages_are_traced_and_stay_frozen():
    model = build(yolov4(frozen_stages=2))
    model.train()
    model.bbox_head.eval()
    before, state = flags(model), copy.deepcopy(model.state_dict())
    assert not all(before[1].values())
    units, _ = find_units(model)
    assert any(unit.name.startswith('backbone.stage1') for unit in units)
    assert flags(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert not hooks(model)


def unread_toy():
    """The last convolutions read what a prediction reads, for nothing."""
    def run(net, x):
        x = net.b(net.a(x))
        net.last(net.inner(x)).mean()
        return net.pred(x)

    return Toy(run, a=Block(3, 6), b=Block(6, 8), inner=Block(8, 5), last=Block(5, 4),
               pred=nn.Conv2d(8, 2, 1))


def test_layers_whose_outputs_reach_no_prediction():
    """They read channels as other layers do, and the last of them keeps its own."""
    found, skipped = by_name(unread_toy())
    assert members(found['b.conv'], 'in') == ['inner.conv', 'pred']
    assert set(found) == {'a.conv', 'b.conv', 'inner.conv'}
    assert skipped == {'last.conv': 'no prediction depends on its outputs',
                       'pred': 'its outputs are the predictions'}
    assert_exact(unread_toy(), {'a.conv': [0, 5], 'b.conv': [1, 2, 7], 'inner.conv': [0]}, {
        **block('a', [0, 5]), ('b.conv', 'in'): [0, 5], **block('b', [1, 2, 7]),
        ('pred', 'in'): [1, 2, 7], ('inner.conv', 'in'): [1, 2, 7], **block('inner', [0]),
        ('last.conv', 'in'): [0]})


def test_computing_something_for_nothing_changes_nothing():
    """Such as a mean of what a layer emits, which others read, too."""
    def run(net, x):
        x = net.a(x)
        x.mean((2, 3)).sum(1)
        (x + 1).detach()
        return net.pred(net.b(x))

    found, skipped = by_name(Toy(run, a=Block(3, 6), b=Block(6, 8), pred=nn.Conv2d(8, 2, 1)))
    assert set(found) == {'a.conv', 'b.conv'} and list(skipped) == ['pred']


@pytest.mark.parametrize('checkpoint, kwargs', [
    ('owner', {}), ('owner', dict(use_reentrant=True)), ('owner', dict(use_reentrant=False)),
    ('imported', dict(use_reentrant=True))])
def test_gradient_checkpointing_hides_nothing(checkpoint, kwargs):
    run = dict(imported=torch.utils.checkpoint.checkpoint,
               owner=lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(*args, **kwargs))

    def forward(net, x):
        return net.pred(run[checkpoint](net.b, net.a(x), **kwargs))

    model = Toy(forward, a=Block(3, 6), b=nn.Sequential(Block(6, 5), Block(5, 8)),
                pred=nn.Conv2d(8, 2, 1))
    found, _ = by_name(model)
    assert set(found) == {'a.conv', 'b.0.conv', 'b.1.conv'}
    before = torch.utils.checkpoint.checkpoint, torch.utils.checkpoint.CheckpointFunction
    assert before[0].__module__ == before[1].__module__ == 'torch.utils.checkpoint'


def test_dropping_is_switched_off():
    """Channels before DropBlock, or before what users have written like it, can be removed."""
    class OwnDrop(nn.Module):
        def forward(self, x):
            return x * (torch.rand(1, x.shape[1], 1, 1) > 0.5) if self.training else x

    model = Toy(lambda net, x: net.pred(net.own(net.b(net.drop(net.a(x))))), a=Block(3, 6),
                drop=DropBlock(0.3, 3), b=Block(6, 8), own=OwnDrop(), pred=nn.Conv2d(8, 2, 1))
    found, skipped = by_name(model.train())
    assert set(found) == {'a.conv', 'b.conv'} and list(skipped) == ['pred']
    assert model.drop.training and model.own.training


def test_everything_is_restored_when_the_model_fails():
    def run(net, x):
        net.a(x)
        raise RuntimeError('no such thing')

    model = Toy(run, a=Block(3, 4), b=Block(4, 4)).train()
    model.a.bn.eval()
    model.b.conv.weight.requires_grad_(False)
    own = model.a.register_forward_hook(lambda *_: None)
    before = flags(model)
    with pytest.raises(Exception, match='no such thing'):
        find_units(model, SIZE)
    assert flags(model) == before
    assert hooks(model) == ['a'] and list(model.a._forward_hooks) == [own.id]


def test_failing_model_is_a_pruning_error():
    model = Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4), b=Block(5, 4))
    with pytest.raises(PruningError):
        find_units(model, SIZE)


def test_eval_model_stays_in_eval_mode():
    model = residual_toy().eval()
    state = copy.deepcopy(model.state_dict())
    find_units(model, SIZE)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_works_without_gradients_enabled():
    with torch.no_grad():
        found, _ = by_name(residual_toy())
        assert not torch.is_grad_enabled()
    assert len(found) == 3


def test_modules_for_training_only():
    class Helper(nn.Conv2d):
        training_only = 'call remove_helpers(model)'

    model = Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4), b=Helper(4, 2, 1))
    with pytest.raises(PruningError, match=r'b \(Helper\) is only for training .* '
                                           r'before it is pruned: call remove_helpers\(model\)'):
        find_units(model, SIZE)


def test_max_pool_and_upsample_keep_the_channels():
    model = randomise(Toy(
        lambda net, x: net.pred(F.interpolate(F.max_pool2d(net.a(x), 2), scale_factor=2)),
        a=Block(3, 4), pred=nn.Conv2d(4, 2, 1)))
    found, _ = by_name(model)
    (reader, ) = found['a.conv'].side('in')
    assert reader.channels.tolist() == reader.unit_index.tolist() == [0, 1, 2, 3]


def test_without_torch_pruning():
    code = """
import sys
sys.modules['torch_pruning'] = None
import torch.nn as nn
from mmgcp.errors import PruningError
from mmgcp.pruning.graph import find_units
class Net(nn.Conv2d):
    def forward(self, x, mode):
        return super().forward(x)
try:
    find_units(Net(3, 3, 1))
except PruningError as error:
    print(error)
"""
    result = run_code(code)
    assert 'pip install --no-deps torch-pruning' in result.stdout


class Parametric(nn.Module):
    """A parameter and a function that uses it."""

    def __init__(self, shape, combine):
        super().__init__()
        self.scale, self.combine = nn.Parameter(1 + torch.rand(shape)), combine

    def forward(self, x):
        return self.combine(x, self.scale)


def l2_norm(x, scale):
    """SSD's."""
    return scale[None, :, None, None].expand_as(x) * x / (
        x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def chain(inner, width=6, outputs=6, **layers):
    """A block, something, another block, and a prediction.

    Args:
        inner (Callable): Gets the network, the first block's map and the image.
        width (int): Channels of the first block.
        outputs (int): Channels of what the inner function returns.
    """
    return Toy(lambda net, x: net.pred(net.z(inner(net, net.a(x), x))), a=Block(3, width),
               **layers, z=Block(outputs, 4), pred=nn.Conv2d(4, 2, 1))


def test_depthwise_convolution():
    model = chain(lambda net, x, _: F.relu(net.norm(net.depth(x))),
                  depth=nn.Conv2d(6, 6, 3, padding=1, groups=6), norm=nn.BatchNorm2d(6))
    found, skipped = by_name(model)
    assert list(skipped) == ['pred'] and set(found) == {'a.conv', 'z.conv'}
    assert members(found['a.conv'], 'out') == ['a.bn', 'a.conv', 'depth', 'norm']
    assert members(found['a.conv'], 'in') == ['z.conv']
    model = assert_exact(model, {'a.conv': [1, 5]}, {
        **block('a', [1, 5]), ('depth', 'out'): [1, 5], ('norm', 'out'): [1, 5],
        ('z.conv', 'in'): [1, 5]})
    assert model.depth.groups == 4


def test_transposed_depthwise_convolution():
    model = chain(lambda net, x, _: F.leaky_relu(net.depth(x)),
                  depth=nn.ConvTranspose2d(6, 6, 2, 2, groups=6))
    assert_exact(model, {'a.conv': [0]}, {
        **block('a', [0]), ('depth', 'out'): [0], ('z.conv', 'in'): [0]})


def test_grouped_convolution():
    model = chain(lambda net, x, _: F.relu(net.grouped(x)), outputs=8,
                  grouped=nn.Conv2d(6, 8, 3, padding=1, groups=2))
    found, skipped = by_name(model)
    assert list(skipped) == ['pred']
    assert found['a.conv'].conv_groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert found['grouped'].conv_groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found['z.conv'].conv_groups is None and found['a.conv'].norm_groups is None
    model = assert_exact(model, {'a.conv': [1, 3], 'grouped': [0, 3, 6, 7]}, {
        **block('a', [1, 3]), ('grouped', 'in'): [1, 3], ('grouped', 'out'): [0, 3, 6, 7],
        ('z.conv', 'in'): [0, 3, 6, 7]})
    assert model.grouped.groups == 2


def test_grouped_transposed_convolution():
    model = chain(lambda net, x, _: F.relu(net.grouped(x)), outputs=4,
                  grouped=nn.ConvTranspose2d(6, 4, 2, 2, groups=2))
    found, _ = by_name(model)
    assert found['grouped'].conv_groups.tolist() == [0, 0, 1, 1]
    assert_exact(model, {'a.conv': [2, 5], 'grouped': [0, 3]}, {
        **block('a', [2, 5]), ('grouped', 'in'): [2, 5], ('grouped', 'out'): [0, 3],
        ('z.conv', 'in'): [0, 3]})


def test_group_norm():
    model = chain(lambda net, x, _: F.relu(net.norm(net.conv(x))), outputs=8,
                  conv=nn.Conv2d(6, 8, 3, padding=1), norm=nn.GroupNorm(4, 8))
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.uniform_(model.norm.bias)
    found, skipped = by_name(model)
    assert list(skipped) == ['pred']
    assert found['conv'].norm_groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found['conv'].conv_groups is None and found['a.conv'].norm_groups is None
    gone = [2, 3, 6, 7]
    model = assert_exact(model, {'conv': gone}, {
        ('conv', 'out'): gone, ('norm', 'out'): gone, ('z.conv', 'in'): gone})
    assert model.norm.num_groups == 2


def test_group_norm_of_a_concatenation():
    model = Toy(lambda net, x: net.pred(net.norm(torch.cat((net.a(x), net.b(x)), 1))),
                a=Block(3, 4), b=Block(3, 6), norm=nn.GroupNorm(5, 10), pred=nn.Conv2d(10, 2, 1))
    found, _ = by_name(model)
    assert found['a.conv'].norm_groups.tolist() == [0, 0, 1, 1]
    assert found['b.conv'].norm_groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert_exact(model, {'a.conv': [0, 1], 'b.conv': [2, 3]}, {
        **block('a', [0, 1]), **block('b', [2, 3]), ('norm', 'out'): [0, 1, 6, 7],
        ('pred', 'in'): [0, 1, 6, 7]})


def csp(identity=False):
    return chain(lambda net, x, _: net.csp(x), outputs=5, csp=CSPLayerWithTwoConv(
        6, 5, expand_ratio=0.8, num_blocks=1, add_identity=identity))


def test_split_of_a_csp_layer():
    """The second half has more readers than the first, and keeps fewer channels."""
    found, skipped = by_name(csp())
    assert list(skipped) == ['pred']
    unit = found['csp.main_conv.conv']
    (reader, ) = [x for x in unit.side('in') if x.module == 'csp.blocks.0.conv1.conv']
    assert sorted(zip(reader.unit_index.tolist(), reader.channels.tolist())) == [
        (4, 0), (5, 1), (6, 2), (7, 3)]
    gone = [0, 4, 5, 7]
    model = assert_exact(csp(), {'csp.main_conv.conv': gone}, {
        ('csp.main_conv.conv', 'out'): gone, ('csp.main_conv.bn', 'out'): gone,
        ('csp.blocks.0.conv1.conv', 'in'): [0, 1, 3], ('csp.final_conv.conv', 'in'): gone})
    assert model.csp.mid_channels == 3


def test_split_of_a_csp_layer_with_a_shortcut():
    gone = [1, 2, 6]
    assert_exact(csp(identity=True), {'csp.main_conv.conv': gone}, {
        ('csp.main_conv.conv', 'out'): gone, ('csp.main_conv.bn', 'out'): gone,
        ('csp.blocks.0.conv1.conv', 'in'): [2], ('csp.blocks.0.conv2.conv', 'out'): [2],
        ('csp.blocks.0.conv2.bn', 'out'): [2],
        ('csp.final_conv.conv', 'in'): [1, 2, 6, 10]})


A_AND_Z = {**block('a', [1, 4]), ('z.conv', 'in'): [1, 4]}


@pytest.mark.parametrize('inner', [
    lambda net, x, _: 2 * x + 0,
    lambda net, x, _: 1 - x / 3,
    lambda net, x, _: x * torch.tensor(0.5) + torch.ones(1),
    lambda net, x, image: x * image[:, :1],
    lambda net, x, image: x * image.mean(1, keepdim=True),
    lambda net, x, image: torch.where(image[:, :1] > 0.5, x, -x),
    lambda net, x, image: x * (x > 0.1),
    lambda net, x, _: F.normalize(x, dim=1),
    lambda net, x, _: x[..., 2:6, 1:].contiguous(),
    lambda net, x, _: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    lambda net, x, _: torch.stack((x, 2 * x), 2).sum(2),
    lambda net, x, _: torch.cat((x, 2 * x), 3),
    lambda net, x, _: torch.cat((x, 2 * x), -1),
    lambda net, x, _: torch.cat((x, 2 * x), 0)[:2],
    lambda net, x, _: torch.max(x, 1 - x),
], ids=range(15))
def test_what_leaves_channels_by_themselves(inner):
    """``1 - x`` turns channels of zeros into ones, which no layer reads any more."""
    assert_exact(chain(inner), {'a.conv': [1, 4]}, A_AND_Z)


@pytest.mark.parametrize('layer', [
    nn.Dropout(0.5), nn.Dropout2d(0.5), nn.PReLU(), nn.SiLU(), nn.Identity(), nn.MaxPool2d(3, 1, 1),
    nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Upsample(scale_factor=2), nn.InstanceNorm2d(6),
    nn.ReLU(inplace=True), nn.ZeroPad2d(1)], ids=lambda layer: type(layer).__name__)
def test_layers_that_leave_channels_by_themselves(layer):
    assert_exact(chain(lambda net, x, _: net.layer(x), layer=layer), {'a.conv': [1, 4]}, A_AND_Z)


def test_norm_without_scale():
    model = chain(lambda net, x, _: net.norm(x), norm=nn.BatchNorm2d(6, affine=False))
    found, _ = by_name(model)
    assert members(found['a.conv'], 'out') == ['a.bn', 'a.conv', 'norm']
    randomise(model)
    expected = run(zero(model, A_AND_Z), 16)
    remove_channels(model, found.values(), {'a.conv': torch.tensor([1, 4])})
    assert difference(run(model, 16), expected) < 1e-9
    assert model.norm.num_features == len(model.norm.running_var) == 4


@pytest.mark.parametrize('shape, combine', [
    ((1, 6, 1, 1), torch.add), ((1, 6, 1, 1), torch.mul), ((6, 1, 1), torch.mul),
    ((6, ), l2_norm), ((6, ), lambda x, scale: x + scale.view(1, -1, 1, 1))],
    ids=['implicit-a', 'implicit-m', 'three', 'l2-norm', 'view'])
def test_parameters(shape, combine):
    model = chain(lambda net, x, _: net.own(x), own=Parametric(shape, combine))
    found, skipped = by_name(model)
    assert members(found['a.conv'], 'out') == ['a.bn', 'a.conv', 'own.scale']
    assert list(skipped) == ['pred']
    model = assert_exact(model, {'a.conv': [1, 4]}, {**A_AND_Z, ('own.scale', 'out'): [1, 4]})
    assert model.own.scale.shape == tuple(4 if size == 6 else size for size in shape)


@pytest.mark.parametrize('shape', [(), (1, ), (1, 1, 1, 1)])
def test_parameters_for_all_channels(shape):
    assert_exact(chain(lambda net, x, _: net.own(x), own=Parametric(shape, torch.mul)),
                 {'a.conv': [1, 4]}, A_AND_Z)


def test_channel_attention():
    model = chain(
        lambda net, x, _: x * net.excite(F.relu(net.squeeze(x.mean((2, 3), True)))).sigmoid(),
        squeeze=nn.Conv2d(6, 3, 1), excite=nn.Conv2d(3, 6, 1))
    assert_exact(model, {'a.conv': [1, 4], 'squeeze': [0]}, {
        **A_AND_Z, ('squeeze', 'in'): [1, 4], ('excite', 'out'): [1, 4], ('squeeze', 'out'): [0],
        ('excite', 'in'): [0]})


def test_shared_convolution():
    """As in the heads of RetinaNet and RTMDet: one convolution, a norm for each level."""
    def forward(net, x):
        first, second = net.a(x), net.b(F.max_pool2d(x, 2))
        return [net.pred(F.relu(norm(net.shared(x)))) for norm, x in
                ((net.n1, first), (net.n2, second))]

    model = Toy(forward, a=Block(3, 4), b=Block(3, 4), shared=nn.Conv2d(4, 5, 3, padding=1),
                n1=nn.BatchNorm2d(5), n2=nn.BatchNorm2d(5), pred=nn.Conv2d(5, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'a.conv', 'shared'} and list(skipped) == ['pred']
    assert members(found['a.conv'], 'out') == ['a.bn', 'a.conv', 'b.bn', 'b.conv']
    assert members(found['shared'], 'out') == ['n1', 'n2', 'shared']
    assert_exact(model, {'a.conv': [3], 'shared': [0, 2]}, {
        **block('a', [3]), **block('b', [3]), ('shared', 'in'): [3], ('shared', 'out'): [0, 2],
        ('n1', 'out'): [0, 2], ('n2', 'out'): [0, 2], ('pred', 'in'): [0, 2]})


def test_frozen_layers():
    model = chain(lambda net, x, _: net.b(x), outputs=5, b=Block(6, 5))
    for param in (*model.a.parameters(), model.z.bn.weight):
        param.requires_grad_(False)
    model.a.eval()
    before = flags(model)
    model = assert_exact(model, {'a.conv': [0], 'z.conv': [1, 2]}, {
        **block('a', [0]), ('b.conv', 'in'): [0], **block('z', [1, 2]), ('pred', 'in'): [1, 2]})
    assert flags(model) == before


def test_linear_layers():
    model = Toy(lambda net, x: net.pred(F.relu(net.norm(net.hidden(net.a(x).flatten(1))))),
                a=Block(3, 4), hidden=nn.Linear(4 * 64, 5), norm=nn.BatchNorm1d(5),
                pred=nn.Linear(5, 2))
    found, skipped = by_name(model, (3, 8, 8))
    assert list(skipped) == ['pred']
    (reader, ) = found['a.conv'].side('in')
    assert sorted(reader.select(found['a.conv'].mask([2])).tolist()) == list(range(128, 192))
    assert_exact(model, {'a.conv': [2], 'hidden': [0, 4]}, {
        **block('a', [2]), ('hidden', 'in'): list(range(128, 192)), ('hidden', 'out'): [0, 4],
        ('norm', 'out'): [0, 4], ('pred', 'in'): [0, 4]}, (3, 8, 8))


def test_normalised_vector():
    model = Toy(lambda net, x: net.pred(net.norm(net.a(x).flatten(1))), a=Block(3, 4),
                norm=nn.BatchNorm1d(64), pred=nn.Linear(64, 2))
    gone = [*range(0, 16), *range(48, 64)]
    assert_exact(model, {'a.conv': [0, 3]}, {
        **block('a', [0, 3]), ('norm', 'out'): gone, ('pred', 'in'): gone}, (3, 4, 4))


def test_pooled_vector():
    model = Toy(lambda net, x: net.pred(net.a(x).mean((2, 3))), a=Block(3, 4),
                pred=nn.Linear(4, 2))
    assert_exact(model, {'a.conv': [2]}, {**block('a', [2]), ('pred', 'in'): [2]})


def test_repeated_concatenation():
    model = chain(lambda net, x, _: torch.cat((x, net.b(x), F.max_pool2d(x, 3, 1, 1), x), dim=-3),
                  width=3, outputs=11, b=Block(3, 2))
    assert_exact(model, {'a.conv': [1], 'b.conv': [0]}, {
        **block('a', [1]), ('b.conv', 'in'): [1], **block('b', [0]),
        ('z.conv', 'in'): [1, 3, 6, 9]})


def test_concatenation_of_concatenations():
    def inner(net, x, image):
        both = torch.cat((x, net.b(image)), 1)
        return torch.cat((net.c(both), both), 1)

    model = chain(inner, width=3, outputs=7, b=Block(3, 2), c=Block(5, 2))
    assert_exact(model, {'a.conv': [1], 'b.conv': [0], 'c.conv': [1]}, {
        **block('a', [1]), **block('b', [0]), ('c.conv', 'in'): [1, 3], **block('c', [1]),
        ('z.conv', 'in'): [1, 3, 5]})


def test_concatenation_of_concatenations_with_themselves():
    def inner(net, x, _):
        x = torch.cat((x, x), 1)
        return torch.cat((x, x, F.max_pool2d(x, 3, 1, 1)), 1)

    found, skipped = by_name(chain(inner, width=2, outputs=12))
    assert list(skipped) == ['pred']
    (reader, ) = found['a.conv'].side('in')
    assert sorted(zip(reader.channels.tolist(), reader.unit_index.tolist())) == [
        (channel, channel % 2) for channel in range(12)]
    assert_exact(chain(inner, width=2, outputs=12), {'a.conv': [1]}, {
        **block('a', [1]), ('z.conv', 'in'): [1, 3, 5, 7, 9, 11]})


def test_layer_that_has_each_channel_twice():
    """This works as long as the unit is followed from the layer with each channel once."""
    def forward(net, x):
        first = net.a(x)
        return net.pred(torch.cat((first, first), 1) + net.d(x))

    model = Toy(forward, a=Block(3, 3), d=Block(3, 6), pred=nn.Conv2d(6, 2, 1))
    assert_exact(model, {'a.conv': [1]}, {
        **block('a', [1]), **block('d', [1, 4]), ('pred', 'in'): [1, 4]})
    model = Toy(forward, d=Block(3, 6), a=Block(3, 3), pred=nn.Conv2d(6, 2, 1))
    found, skipped = by_name(model)
    assert not found
    assert set(skipped) == {'pred', 'a.conv', 'a.bn', 'd.conv', 'd.bn'}
    assert 'tied to each other' in skipped['a.conv']


def constant(x):
    return torch.linspace(0, 1, x.shape[1])[None, :, None, None].to(x)


def narrowed(net, x, _):
    return torch.cat((x.narrow(-3, 0, 2), net.b(x.narrow(-3, 2, 4))), 1)


def squeezed_gate(net, x, _):
    return x * x[:, 0].sigmoid()[:, None]


def shuffled(net, x, _):
    return x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def attended(net, x, _):
    values = x.flatten(2)
    keys = net.keys(x).view(len(x), -1, 1).softmax(1)
    return x + torch.matmul(values, keys).view(len(x), -1, 1, 1)


LEFT_ALONE = dict(
    image_added=(lambda net, x, image: net.b(x) + image, dict(b=Block(6, 3), outputs=3),
                 ['b'], 'combined with something that is not the output'),
    image_multiplied=(lambda net, x, image: image.mul(net.b(x)), dict(b=Block(6, 3), outputs=3),
                      ['b'], 'combined with something'),
    image_in_place=(lambda net, x, image: net.b(x).add_(image), dict(b=Block(6, 3), outputs=3),
                    ['b'], 'combined with something'),
    image_by_keyword=(lambda net, x, image: torch.sub(net.b(x), other=image),
                      dict(b=Block(6, 3), outputs=3), ['b'], 'combined with something'),
    image_maximum=(lambda net, x, image: torch.maximum(image, net.b(x)),
                   dict(b=Block(6, 3), outputs=3), ['b'], 'combined with something'),
    image_concatenated=(lambda net, x, image: torch.cat((image, x), 1), dict(outputs=9),
                        ['a'], 'combined with something'),
    image_concatenated_and_added=(
        lambda net, x, image: torch.cat((image, x), 1) + net.b(image),
        dict(b=Block(3, 9), outputs=9), ['a', 'b'], 'combined with something'),
    constant_added=(lambda net, x, _: x + constant(x), {}, ['a'], 'combined with something'),
    constant_factor=(lambda net, x, _: x / (1 + constant(x)[0]), {}, ['a'],
                     'combined with something'),
    detached=(lambda net, x, _: x * x.detach(), {}, ['a'], 'combined with something'),
    deformable=(lambda net, x, _: net.deform(x), dict(deform=DeformConv2dPack(6, 6, 3, padding=1)),
                ['a'], 'deform'),
    modulated=(lambda net, x, _: net.deform(x),
               dict(deform=ModulatedDeformConv2dPack(6, 5, 3, padding=1), outputs=5),
               ['a'], 'deform'),
    multiplier=(lambda net, x, _: net.many(x), dict(many=nn.Conv2d(6, 12, 1, groups=6),
                                                    outputs=12), ['a', 'many'],
                'grouped convolution many'),
    divisor=(lambda net, x, _: net.few(x), dict(few=nn.Conv2d(6, 3, 1, groups=3), outputs=3),
             ['a', 'few'], 'few'),
    part_of_grouped=(lambda net, x, image: net.grouped(torch.cat((x, net.b(image)), 1)),
                     dict(b=Block(3, 2), grouped=nn.Conv2d(8, 6, 1, groups=2)),
                     ['a', 'b'], 'only some channels of the grouped convolution grouped'),
    grouped_and_normalised=(lambda net, x, _: net.grouped(net.norm(x)),
                            dict(norm=nn.GroupNorm(3, 6), grouped=nn.Conv2d(6, 6, 1, groups=2)),
                            ['a', 'norm'], 'both the GroupNorm norm and the grouped'),
    divided_differently=(lambda net, x, _: net.two(x) + net.three(x),
                         dict(two=nn.Conv2d(6, 6, 1, groups=2),
                              three=nn.Conv2d(6, 6, 1, groups=3)),
                         ['a', 'two', 'three'], 'divide its channels differently'),
    part_of_norm=(lambda net, x, image: net.norm(torch.cat((x, net.b(image)), 1)),
                  dict(b=Block(3, 2), norm=nn.GroupNorm(2, 8), outputs=8), ['a', 'b'],
                  'not all channels of a group of the GroupNorm norm'),
    prelu=(lambda net, x, _: net.act(x), dict(act=nn.PReLU(6)), ['a', 'act'], 'PReLU act'),
    instance_norm=(lambda net, x, _: net.norm(x), dict(norm=nn.InstanceNorm2d(6, affine=True)),
                   ['a', 'norm'], 'InstanceNorm2d norm'),
    instance_statistics=(lambda net, x, _: net.norm(x),
                         dict(norm=nn.InstanceNorm2d(6, track_running_stats=True)),
                         ['a', 'norm'], 'InstanceNorm2d norm'),
    layer_norm=(lambda net, x, _: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                dict(norm=nn.LayerNorm(6)), ['a', 'norm'], 'LayerNorm norm'),
    plain_layer_norm=(lambda net, x, _: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                      dict(norm=nn.LayerNorm(6, elementwise_affine=False)), ['a'],
                      'mixed or reordered'),
    positions=(lambda net, x, _: net.own(x),
               dict(own=Parametric((1, 6, 16, 16), torch.add)), ['a'], 'parameter own.scale'),
    sliced=(lambda net, x, _: torch.cat((x[:, :2], net.b(x[:, 2:])), 1), dict(b=Block(4, 4)),
            ['a'], 'split by a module that does not say how'),
    split=(lambda net, x, _: torch.cat((x.split((2, 4), 1)[0], net.b(x.split((2, 4), 1)[1])), 1),
           dict(b=Block(4, 4)), ['a'], 'split by a module'),
    chunked=(lambda net, x, _: torch.cat((net.b(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]), 1),
             dict(b=Block(3, 3)), ['a'], 'split by a module'),
    chunked_backwards=(lambda net, x, _: torch.cat((net.b(x.chunk(2, -3)[0]),
                                                    x.chunk(2, -3)[1]), 1),
                       dict(b=Block(3, 3)), ['a'], 'split by a module'),
    narrowed=(narrowed, dict(b=Block(4, 4)), ['a'], 'split by a module'),
    strided=(lambda net, x, _: torch.cat((x[:, ::2], x[:, 1::2]), 1), {}, ['a'],
             'split by a module'),
    flipped=(lambda net, x, _: x.flip(1), {}, ['a'], 'mixed or reordered'),
    flipped_backwards=(lambda net, x, _: x.flip(-3), {}, ['a'], 'mixed or reordered'),
    rolled=(lambda net, x, _: x.roll(1, 1), {}, ['a'], 'mixed or reordered'),
    indexed=(lambda net, x, _: x[:, [5, 4, 3, 0, 1, 2]], {}, ['a'], 'mixed or reordered'),
    index_selected=(lambda net, x, _: x.index_select(1, torch.arange(6)), {}, ['a'],
                    'mixed or reordered'),
    gate=(squeezed_gate, {}, ['a'], 'mixed or reordered'),
    mean=(lambda net, x, _: x * x.mean(1, keepdim=True), {}, ['a'], 'mixed or reordered'),
    maximum=(lambda net, x, _: x + x.max(1, keepdim=True)[0], {}, ['a'], 'mixed or reordered'),
    softmax=(lambda net, x, _: F.softmax(x, -3), {}, ['a'], 'mixed or reordered'),
    group_norm=(lambda net, x, _: F.group_norm(x, 2), {}, ['a'], 'mixed or reordered'),
    shuffled=(shuffled, {}, ['a'], 'mixed or reordered'),
    channel_shuffle=(lambda net, x, _: F.channel_shuffle(x, 2), {}, ['a'], 'mixed or reordered'),
    pixel_shuffle=(lambda net, x, _: F.pixel_shuffle(x, 2), dict(width=8, outputs=2), ['a'],
                   'not clear which layer each input channel of z.conv is from'),
    attention=(attended, dict(keys=nn.Conv2d(6, 1, 1)), ['a'], '(no end|not clear)'),
    context=(lambda net, x, _: net.context(x), dict(context=ContextBlock(6, 0.5)), ['a'],
             '(no end|not clear|mixed)'),
)


@pytest.mark.parametrize('name', LEFT_ALONE)
def test_what_is_left_alone(name):
    """It gets a reason, and the layers around it are pruned."""
    inner, layers, layers_left, reason = LEFT_ALONE[name]
    model = randomise(chain(inner, **layers))
    found, skipped = by_name(model)
    for layer in layers_left:
        layer = f'{layer}.conv' if isinstance(model.get_submodule(layer), Block) else layer
        assert layer not in found
        assert re.search(reason, skipped[layer]), skipped[layer]
    named = {item.module for unit in found.values() for item in unit.side('out')}
    assert not named & set(skipped)
    assert_exact(model, {'z.conv': [0, 3]}, {**block('z', [0, 3]), ('pred', 'in'): [0, 3]})


def test_units_that_contradict_each_other():
    """A unit with channels that a layer does not have is left alone."""
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(2))

        def forward(self, x, y):
            return self.weights[0] * x + self.weights[1] * y

    model = Toy(lambda net, x: net.pred(net.sum(net.a(x), net.b(x))), a=Block(3, 4), b=Block(3, 4),
                sum=Weighted(), pred=nn.Conv2d(4, 2, 1))
    found, skipped = by_name(model)
    assert not found
    assert 'not clear which of its channels sum.weights has' in skipped['a.conv']


def test_units_that_share_channels():
    """No network is known that leads to such units, now that the channels of concatenations
    are recorded."""
    def make(name, *channels):
        return ChannelUnit(name, 2, tuple(
            ChannelSlice(layer, side, torch.tensor(indices), torch.arange(2))
            for layer, side, indices in channels))

    model = nn.ModuleDict(dict(a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1), c=nn.Conv2d(4, 2, 1)))
    known = {}
    first = make('a', ('a', 'out', [0, 1]), ('c', 'in', [0, 1]))
    second = make('b', ('b', 'out', [0, 1]), ('c', 'in', [2, 3]), ('c', 'out', [0, 1]))
    assert find_contradiction(model, first, known) == find_contradiction(model, second, known) == ''
    assert known['c', 'in'] == {0, 1, 2, 3}
    for wrong in (make('b', ('c', 'in', [1, 0])), make('b', ('b', 'in', [0, 2]),
                                                       ('c', 'in', [5, 4]))):
        assert find_contradiction(model, wrong, dict(known)) == (
            'it is not clear which of its channels c has')


def test_endless_units():
    """Torch-Pruning takes the view for a flatten and multiplies indices without end."""
    _, skipped = by_name(chain(attended, keys=nn.Conv2d(6, 1, 1)))
    assert skipped['a.conv'] == 'Torch-Pruning finds no end of what is coupled with it'
