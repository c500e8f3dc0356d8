# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Block, Toy, build, randomise, residual_toy, yolov4

from mmgcp.pruning.dependency_graph import find_coupled_channels, flatten_tensors, traceable
from mmgcp.pruning.structures import PruningError

SIZE = (3, 16, 16)


def by_name(model, size=SIZE):
    coupled_sets, skipped = find_coupled_channels(model, size)
    return {coupled.name: coupled for coupled in coupled_sets}, skipped


def members(coupled, side):
    return sorted(item.module for item in coupled.side(side))


def flags(model):
    return ({name: module.training for name, module in model.named_modules()},
            {name: param.requires_grad for name, param in model.named_parameters()})


def hooks(model):
    return [name for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks]


def test_yolov4_shortcuts_are_one_set(sets):
    found = {coupled.name: coupled for coupled in sets}
    for stage, blocks in ((3, 3), (4, 3), (5, 1)):
        csp = f'backbone.stage{stage}.1'
        outs = [f'{csp}.main_conv', *(f'{csp}.blocks.{i}.conv2' for i in range(blocks))]
        assert members(found[f'{csp}.main_conv.conv'], 'out') == sorted(
            f'{name}.{part}' for name in outs for part in ('conv', 'bn'))
        ins = [*(f'{csp}.blocks.{i}.conv1' for i in range(blocks)), f'{csp}.post_conv']
        assert members(found[f'{csp}.main_conv.conv'], 'in') == sorted(
            f'{name}.conv' for name in ins)


def test_yolov4_covers_every_convolution_once(original):
    model, sets, skipped = original
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    seen = {}
    for coupled in sets:
        for item in coupled.side('out'):
            for channel in item.channels.tolist():
                key = (item.module, channel)
                assert key not in seen
                seen[key] = coupled.name
    preds = {f'bbox_head.head_module.convs_pred.{level}' for level in range(3)}
    assert set(skipped) == preds
    assert all('prediction' in reason for reason in skipped.values())
    assert {name for name, _ in seen if name in convs} == convs - preds
    for name in convs - preds:
        assert sum(key[0] == name for key in seen) == model.get_submodule(name).out_channels
    order = [name for name, _ in model.named_modules()]
    assert [x.name for x in sets] == sorted((x.name for x in sets), key=order.index)


def test_yolov4_pyramid_pooling_repeats_its_input(sets):
    found = {coupled.name: coupled for coupled in sets}
    coupled = found['neck.reduce_layers.2.pre_convs.2.conv']
    (reader, ) = [item for item in coupled.side('in')]
    assert reader.module == 'neck.reduce_layers.2.post_convs.0.conv'
    assert coupled.size == 64
    # four copies: three poolings and the map itself
    assert sorted(reader.select(coupled.mask(torch.tensor([5]))).tolist()) == [5, 69, 133, 197]


def test_concat_offsets():
    model = Toy(lambda net, x: net.pred(torch.cat((net.a(x), net.b(x), net.c(x)), 1)),
                a=Block(3, 4), b=Block(3, 2), c=Block(3, 3), pred=nn.Conv2d(9, 2, 1))
    found, skipped = by_name(model)
    for name, offset in (('a', 0), ('b', 4), ('c', 6)):
        coupled = found[f'{name}.conv']
        (reader, ) = coupled.side('in')
        assert reader.module == 'pred'
        pairs = sorted(zip(reader.roots.tolist(), reader.channels.tolist()))
        assert pairs == [(i, offset + i) for i in range(coupled.size)]
        assert members(coupled, 'out') == [f'{name}.bn', f'{name}.conv']
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


def test_layers_that_cannot_be_pruned():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 4, 16, 16))

        def forward(self, x):
            return x * self.scale

    model = Toy(
        lambda net, x: net.pred(net.e(net.scaled(net.d(net.layer(net.c(net.twice(net.a(x)))))))),
        a=Block(3, 4), twice=nn.Conv2d(4, 8, 3, padding=1, groups=4), c=Block(8, 4),
        layer=nn.LayerNorm((4, 16, 16)), d=Block(4, 4), scaled=Scaled(), e=Block(4, 5),
        pred=nn.Conv2d(5, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'e.conv'}
    assert 'grouped convolution twice' in skipped['a.conv']
    assert 'LayerNorm layer' in skipped['c.conv']
    assert 'scale' in skipped['d.conv']


def test_depthwise_convolution_and_bare_parameter_go_along():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))

        def forward(self, x):
            return x * self.scale

    model = Toy(lambda net, x: net.pred(net.scaled(net.depth(net.a(x)))), a=Block(3, 4),
                depth=nn.Conv2d(4, 4, 3, padding=1, groups=4), scaled=Scaled(),
                pred=nn.Conv2d(4, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'a.conv'} and set(skipped) == {'pred'}
    assert members(found['a.conv'], 'out') == ['a.bn', 'a.conv', 'depth', 'scaled.scale']
    assert members(found['a.conv'], 'in') == ['pred']


def test_group_norm_makes_units():
    model = Toy(lambda net, x: net.pred(net.norm(net.a(x))), a=Block(3, 6),
                norm=nn.GroupNorm(3, 6), pred=nn.Conv2d(6, 2, 1))
    found, _ = by_name(model)
    assert found['a.conv'].units.tolist() == [0, 0, 1, 1, 2, 2]
    assert found['a.conv'].blocks is None


def test_grouped_convolution_makes_blocks():
    model = Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 6),
                b=nn.Conv2d(6, 4, 1, groups=2), pred=nn.Conv2d(4, 2, 1))
    found, _ = by_name(model)
    assert found['a.conv'].blocks.tolist() == [0, 0, 0, 1, 1, 1]
    assert found['b'].blocks.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('cut', [lambda x: x.chunk(2, 1), lambda x: x.split([2, 4], 1),
                                 lambda x: (x[:, :3], x[:, 3:]), lambda x: torch.split(x, 3, 1)])
def test_split_in_an_unknown_module_is_left_alone(cut):
    def run(net, x):
        first, second = cut(net.a(x))
        return net.pred(net.b(x)) + net.p(first).mean() + net.q(second).mean()

    first, second = (part.shape[1] for part in cut(torch.zeros(1, 6, 2, 2)))
    model = Toy(run, a=Block(3, 6), b=Block(3, 5), p=nn.Conv2d(first, 2, 1),
                q=nn.Conv2d(second, 2, 1), pred=nn.Conv2d(5, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'b.conv'}
    assert skipped['a.conv'] == 'its channels are split by a module that does not say how'


def test_scalars_do_not_matter():
    model = Toy(lambda net, x: net.pred(2 * (0 + net.a(x)) - 1), a=Block(3, 4),
                pred=nn.Conv2d(4, 2, 1))
    assert set(by_name(model)[0]) == {'a.conv'}


@pytest.mark.parametrize('combine', [lambda x, c: x + c, lambda x, c: c * x, lambda x, c: x - c])
def test_constant_tensor_with_channels_is_left_alone(combine):
    constant = torch.rand(1, 4, 1, 1)
    model = Toy(lambda net, x: net.pred(combine(net.a(x), constant)), a=Block(3, 4),
                pred=nn.Conv2d(4, 2, 1))
    found, skipped = by_name(model)
    assert not found and 'not the output of a layer' in skipped['a.conv']


def test_endless_loop_of_torch_pruning_is_left_alone():
    def run(net, x):  # global context (GCNet)
        y = net.a(x)
        context = y.view(1, 4, 256) @ net.mask(y).view(1, 256, 1).softmax(1)
        return net.pred(net.b(x)) + net.q(y + context.view(1, 4, 1, 1))

    model = Toy(run, a=Block(3, 4), b=Block(3, 5), mask=nn.Conv2d(4, 1, 1),
                q=nn.Conv2d(4, 2, 1), pred=nn.Conv2d(5, 2, 1))
    found, skipped = by_name(model)
    assert set(found) == {'b.conv'} and 'no end' in skipped['a.conv']


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
    coupled_sets, _ = find_coupled_channels(model)
    assert any(coupled.name.startswith('backbone.stage1') for coupled in coupled_sets)
    assert flags(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert not hooks(model)


def test_everything_is_restored_when_the_model_fails():
    def run(net, x):
        net.a(x)
        raise RuntimeError('no such thing')

    model = Toy(run, a=Block(3, 4), b=Block(4, 4)).train()
    model.a.bn.eval()
    model.b.conv.weight.requires_grad_(False)
    before = flags(model)
    with pytest.raises(Exception, match='no such thing'):
        find_coupled_channels(model, SIZE)
    assert flags(model) == before


def test_failing_model_is_a_pruning_error():
    model = Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4), b=Block(5, 4))
    with pytest.raises(PruningError):
        find_coupled_channels(model, SIZE)


def test_eval_model_stays_in_eval_mode():
    model = residual_toy().eval()
    state = copy.deepcopy(model.state_dict())
    find_coupled_channels(model, SIZE)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_traceable_modes():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5)).eval()
    model[0].weight.requires_grad_(False)
    with traceable(model) as modes:
        assert [modes[module] for module in model] == [True, False, False]
        assert all(param.requires_grad for param in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad


def test_works_without_gradients_enabled():
    with torch.no_grad():
        found, _ = by_name(residual_toy())
        assert not torch.is_grad_enabled()
    assert len(found) == 3


def test_flatten_tensors():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = flatten_tensors([a, {'x': (b, None), 'y': c}, 'text'])
    assert [id(item) for item in found] == [id(a), id(b), id(c)]


def test_max_pool_and_upsample_keep_the_channels():
    model = randomise(Toy(
        lambda net, x: net.pred(F.interpolate(F.max_pool2d(net.a(x), 2), scale_factor=2)),
        a=Block(3, 4), pred=nn.Conv2d(4, 2, 1)))
    found, _ = by_name(model)
    (reader, ) = found['a.conv'].side('in')
    assert reader.channels.tolist() == reader.roots.tolist() == [0, 1, 2, 3]


def test_without_torch_pruning():
    code = """
import sys
sys.modules['torch_pruning'] = None
import torch.nn as nn
from mmgcp.pruning import PruningError
from mmgcp.pruning.dependency_graph import find_coupled_channels
class Net(nn.Conv2d):
    def forward(self, x, mode):
        return super().forward(x)
try:
    find_coupled_channels(Net(3, 3, 1))
except PruningError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True,
                            text=True, check=True)
    assert 'pip install --no-deps torch-pruning' in result.stdout
