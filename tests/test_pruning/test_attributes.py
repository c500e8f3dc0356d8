# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import pickle

import pytest
import torch
import torch.nn as nn
from families import family_config
from mmengine.config import Config
from mmyolo.models.layers import CSPLayerWithTwoConv, RepVGGBlock
from pruning_samples import Block, Toy, choose, difference, randomise, run
from zeroing import zero

from mmgcp.pruning import attributes, register_attribute_rule
from mmgcp.pruning.api import prune as prune_detector
from mmgcp.pruning.attributes import UnequalCSPLayerWithTwoConv, refresh_attributes
from mmgcp.pruning.channel_table import count_channels
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import remove_channels
from mmgcp.utils.config import build_detector, load_config

SIZE = (3, 16, 16)


@pytest.fixture
def rules(monkeypatch):
    """Rules that are registered during one test."""
    monkeypatch.setattr(attributes, 'ATTRIBUTE_RULES', dict(attributes.ATTRIBUTE_RULES))
    splitting = set(attributes.SPLITTING_TYPES)
    yield
    attributes.SPLITTING_TYPES.intersection_update(splitting)


def prune(model, removed, size=SIZE):
    units, _ = find_units(model, size)
    remove_channels(model, units, {name: torch.tensor(channels)
                                   for name, channels in removed.items()})
    return model


def deploy(model):
    for module in model.modules():
        if isinstance(module, RepVGGBlock):
            module.switch_to_deploy()
    return model


def rep_vgg(**options):
    """Two blocks, the first of them with an identity unless it comes last."""
    return randomise(Toy(
        lambda net, x: net.pred(net.second(net.first(net.a(x)))), a=Block(3, 6),
        first=RepVGGBlock(6, 6, **options), second=RepVGGBlock(6, 8, stride=2, **options),
        pred=nn.Conv2d(8, 2, 1)))


# The identity ties the outputs of the first block to its inputs
TIED = {('a.conv', 'out'): [1, 4], ('a.bn', 'out'): [1, 4],
        **{(f'first.rbr_{branch}.conv', side): [1, 4] for branch in ('dense', '1x1')
           for side in ('in', 'out')},
        **{(f'first.rbr_{branch}', 'out'): [1, 4] for branch in ('dense.bn', '1x1.bn')},
        ('second.rbr_dense.conv', 'in'): [1, 4], ('second.rbr_1x1.conv', 'in'): [1, 4]}
SECOND = {**{(f'second.rbr_{branch}.{layer}', 'out'): [0, 7] for branch in ('dense', '1x1')
             for layer in ('conv', 'bn')}, ('pred', 'in'): [0, 7]}


@pytest.mark.parametrize('options', [{}, dict(use_bn_first=False, use_alpha=True)],
                         ids=['yolov6', 'ppyoloe'])
def test_rep_vgg(options):
    model = rep_vgg(**options)
    gone = {**TIED, **SECOND}
    if options:
        assert model.first.rbr_identity is None
        removed = {'a.conv': [1, 4], 'first.rbr_dense.conv': [1, 4],
                   'second.rbr_dense.conv': [0, 7]}
    else:
        gone['first.rbr_identity', 'out'] = [1, 4]
        removed = {'a.conv': [1, 4], 'second.rbr_dense.conv': [0, 7]}
    expected = run(zero(model, gone), 16)
    prune(model, removed)
    assert difference(run(model, 16), expected) < 1e-9
    assert (model.first.in_channels, model.first.out_channels, model.first.groups) == (4, 4, 1)
    assert (model.second.in_channels, model.second.out_channels) == (4, 6)
    deployed = deploy(copy.deepcopy(model).double())
    assert difference(run(deployed, 16), expected) < 1e-9
    assert deployed.second.rbr_reparam.weight.shape == (6, 4, 3, 3)
    assert (deployed.second.rbr_reparam.in_channels,
            deployed.second.rbr_reparam.out_channels) == (4, 6)


def test_grouped_rep_vgg():
    model = rep_vgg(groups=2)
    units, _ = find_units(model, SIZE)
    assert units[0].conv_groups.tolist() == [0, 0, 0, 1, 1, 1]
    gone = {**TIED, **SECOND, ('first.rbr_identity', 'out'): [1, 4]}
    expected = run(zero(model, gone), 16)
    prune(model, {'a.conv': [1, 4], 'second.rbr_dense.conv': [0, 7]})
    assert difference(run(model, 16), expected) < 1e-9
    assert model.first.groups == 2
    assert difference(run(deploy(copy.deepcopy(model).double()), 16), expected) < 1e-9


def test_depthwise_rep_vgg():
    model = randomise(Toy(lambda net, x: net.pred(net.first(net.a(x))), a=Block(3, 6),
                          first=RepVGGBlock(6, 6, groups=6), pred=nn.Conv2d(6, 2, 1)))
    prune(model, {'a.conv': [1, 4]})
    assert (model.first.in_channels, model.first.out_channels, model.first.groups) == (4, 4, 4)
    expected = run(model, 16)
    assert difference(run(deploy(model.double()), 16), expected) < 1e-9


def test_rep_vgg_whose_kernel_has_been_asked_for():
    """The block caches the kernel of its identity."""
    model = rep_vgg()
    model.first.get_equivalent_kernel_bias()
    prune(model, {'a.conv': [1, 4]})
    expected = run(model, 16)
    assert difference(run(deploy(model.double()), 16), expected) < 1e-9


def test_deployed_rep_vgg():
    model = deploy(rep_vgg().double())
    gone = {('a.conv', 'out'): [2], ('a.bn', 'out'): [2], ('first.rbr_reparam', 'in'): [2],
            ('first.rbr_reparam', 'out'): [0, 1], ('second.rbr_reparam', 'in'): [0, 1],
            ('second.rbr_reparam', 'out'): [5], ('pred', 'in'): [5]}
    expected = run(zero(model, gone), 16)
    prune(model, {'a.conv': [2], 'first.rbr_reparam': [0, 1], 'second.rbr_reparam': [5]})
    assert difference(run(model, 16), expected) < 1e-9
    assert (model.first.in_channels, model.first.out_channels) == (5, 4)
    assert (model.second.in_channels, model.second.out_channels) == (4, 7)
    model.first.switch_to_deploy()  # does nothing


def test_yolov6_is_deployed_after_pruning():
    model = randomise(build_detector(family_config('yolov6-n'))).double().eval()
    units, _ = find_units(model)
    remove_channels(model, units, choose(units, 0))
    expected = run(model)
    deploy(model)
    assert not any('rbr_dense' in name for name, _ in model.named_modules())
    largest = max(float(x.abs().max()) for x in expected)
    assert difference(expected, run(model)) < 1e-9 * largest


def csp():
    return randomise(Toy(
        lambda net, x: net.pred(net.csp(net.a(x))), a=Block(3, 4),
        csp=CSPLayerWithTwoConv(4, 8, num_blocks=2), pred=nn.Conv2d(8, 2, 1)))


def test_equal_halves_need_no_other_class():
    model = prune(csp(), {'csp.main_conv.conv': [0, 3, 5, 6]})
    assert type(model.csp) is CSPLayerWithTwoConv
    assert model.csp.mid_channels == 2
    assert model(torch.rand(1, *SIZE)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize('first, second, kind', [
    ([0, 2], [1], UnequalCSPLayerWithTwoConv), ([1], [0, 1, 3], UnequalCSPLayerWithTwoConv),
    ([3], [2], CSPLayerWithTwoConv)])
def test_halves(first, second, kind):
    model = csp()
    gone = [*first, *(4 + channel for channel in second)]
    both = {(f'csp.blocks.{number}.{layer}', side): second for number in (0, 1)
            for layer, side in (('conv1.conv', 'in'), ('conv2.conv', 'out'), ('conv2.bn', 'out'))}
    expected = run(zero(model, {
        ('csp.main_conv.conv', 'out'): gone, ('csp.main_conv.bn', 'out'): gone, **both,
        ('csp.final_conv.conv', 'in'): [*gone, *(start + channel for start in (8, 12)
                                                 for channel in second)]}), 16)
    prune(model, {'csp.main_conv.conv': gone})
    assert difference(run(model, 16), expected) < 1e-9
    assert type(model.csp) is kind and model.csp.mid_channels == 4 - len(first)


@pytest.fixture
def unequal():
    """A CSP layer with one and three channels in its halves."""
    return prune(csp(), {'csp.main_conv.conv': [0, 2, 3, 6]})


def test_unequal_halves(unequal):
    assert type(unequal.csp) is UnequalCSPLayerWithTwoConv
    assert isinstance(unequal.csp, CSPLayerWithTwoConv)
    assert unequal.csp.mid_channels == 1
    assert list(unequal.state_dict()) == list(csp().state_dict())


def test_copies_of_unequal_halves(unequal):
    expected = run(unequal, 16)
    layer = pickle.loads(pickle.dumps(unequal.csp))
    assert type(layer) is UnequalCSPLayerWithTwoConv and layer.mid_channels == 1
    twin = copy.deepcopy(unequal)
    twin.csp = layer
    assert difference(run(twin, 16), expected) == 0.
    assert type(copy.deepcopy(unequal.csp)) is UnequalCSPLayerWithTwoConv


def test_unequal_halves_are_pruned_again(unequal):
    gone = [2]  # the middle one of the second half, which both blocks add to
    blocks = {(f'csp.blocks.{number}.conv2.{layer}', 'out'): [1] for number in (0, 1)
              for layer in ('conv', 'bn')}
    blocks.update({(f'csp.blocks.{number}.conv1.conv', 'in'): [1] for number in (0, 1)})
    expected = run(zero(unequal, {
        ('csp.main_conv.conv', 'out'): gone, ('csp.main_conv.bn', 'out'): gone, **blocks,
        ('csp.final_conv.conv', 'in'): [2, 5, 8]}), 16)
    prune(unequal, {'csp.main_conv.conv': gone})
    assert difference(run(unequal, 16), expected) < 1e-9
    assert unequal.csp.mid_channels == 1 and unequal.csp.final_conv.conv.in_channels == 7
    # and once more, until the halves are equal again: nothing is wrong with the class then
    prune(unequal, {'csp.main_conv.conv': [1]})
    assert unequal.csp.mid_channels == 1 and unequal.csp.main_conv.conv.out_channels == 2
    unequal(torch.rand(1, *SIZE))


def test_rebuilt_yolov8():
    narrow = {f'model.{part}.widen_factor': 0.0625
              for part in ('backbone', 'neck', 'bbox_head.head_module')}
    cfg = load_config('mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', narrow)
    model = randomise(build_detector(cfg))
    units, skipped = find_units(model, (3, 64, 64))
    assert len(skipped) == 6
    remove_channels(model, units, choose(units, 1, share=0.5))
    kinds = [type(module) for module in model.modules()
             if isinstance(module, CSPLayerWithTwoConv)]
    assert UnequalCSPLayerWithTwoConv in kinds
    cfg.model.update(type='mmgcp.PrunedDetector', detector='mmyolo.YOLODetector',
                     channels=count_channels(model))
    rebuilt = build_detector(Config(cfg.to_dict()))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert difference(run(rebuilt), run(model)) == 0.
    assert kinds == [type(module) for module in rebuilt.modules()
                     if isinstance(module, CSPLayerWithTwoConv)]


class Counted(nn.Module):
    """A layer that repeats its channels in an attribute and uses that."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(x).view(len(x), self.width, -1).view(len(x), self.width, *x.shape[2:])


class Derived(Counted):
    pass


@pytest.mark.parametrize('kind', [Counted, Derived])
def test_own_rule(rules, kind):
    def make():
        return randomise(Toy(lambda net, x: net.pred(net.counted(net.a(x))), a=Block(3, 5),
                             counted=kind(5), pred=nn.Conv2d(5, 2, 1)))

    gone = {(name, 'out'): [0, 3] for name in ('a.conv', 'a.bn', 'counted.norm')}
    expected = run(zero(make(), {**gone, ('pred', 'in'): [0, 3]}), 16)
    with pytest.raises(RuntimeError, match='invalid for input of size'):
        run(prune(make(), {'a.conv': [0, 3]}), 16)

    @register_attribute_rule(Counted)
    def refresh(module):
        module.width = module.norm.num_features

    model = prune(make(), {'a.conv': [0, 3]})
    assert model.counted.width == 3
    assert difference(run(model, 16), expected) < 1e-9
    assert Counted not in attributes.SPLITTING_TYPES
    assert callable(refresh)


def test_rules_are_for_modules_of_their_type(rules):
    seen = []
    register_attribute_rule(Counted)(lambda module: seen.append(module))
    model = nn.Sequential(Counted(2), nn.ReLU(), nn.Sequential(Derived(2)))
    refresh_attributes(model)
    assert seen == [model[0], model[2][0]]


class Halves(nn.Module):
    """Splits a map into what ``first`` and what ``second`` read."""

    def __init__(self, combine):
        super().__init__()
        self.combine, self.sizes = combine, (2, 3)
        self.first, self.second = Block(2, 4), Block(3, 4)

    def forward(self, x):
        first, second = x.split(self.sizes, 1)
        return self.combine(self, first, second)


def halves(combine):
    return randomise(Toy(lambda net, x: net.pred(net.halves(net.a(x))), a=Block(3, 5),
                         halves=Halves(combine), pred=nn.Conv2d(4, 2, 1)))


def refresh_halves(module):
    module.sizes = (module.first.conv.in_channels, module.second.conv.in_channels)


def test_own_splitting_module(rules):
    def combine(module, first, second):
        return module.first(first) + module.second(second)

    units, skipped = find_units(halves(combine), SIZE)
    assert 'split by a module that does not say how' in skipped['a.conv']
    register_attribute_rule(Halves)(refresh_halves)
    assert 'a.conv' in find_units(halves(combine), SIZE)[1]
    register_attribute_rule(Halves, splits=True)(refresh_halves)

    model = halves(combine)
    expected = run(zero(model, {
        ('a.conv', 'out'): [1, 2, 4], ('a.bn', 'out'): [1, 2, 4],
        ('halves.first.conv', 'in'): [1], ('halves.second.conv', 'in'): [0, 2]}), 16)
    prune(model, {'a.conv': [1, 2, 4]})
    assert model.halves.sizes == (1, 1)
    assert difference(run(model, 16), expected) < 1e-9


def test_parts_that_are_multiplied(rules):
    """Their channels can only be removed in pairs."""
    class Gated(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return first * second.sigmoid()

    register_attribute_rule(Gated, splits=True)(lambda module: None)
    model = randomise(Toy(lambda net, x: net.pred(net.gated(net.a(x))), a=Block(3, 6),
                          gated=Gated(), pred=nn.Conv2d(3, 2, 1)))
    units, skipped = find_units(model, SIZE)
    assert not units
    assert 'several of its channels are tied to each other' in skipped['a.conv']


class OwnBranches(nn.Module):
    """Branches that become one convolution, as users and MMPretrain have them, behind an SE."""

    def __init__(self, inputs, outputs, groups=1):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(inputs, 2, 1), nn.ReLU(), nn.Conv2d(2, inputs, 1))
        self.in_channels, self.out_channels, self.groups = inputs, outputs, groups
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups),
                          nn.BatchNorm2d(outputs)) for kernel in (3, 1))

    def forward(self, x):
        x = x * self.squeeze(x).sigmoid()
        return self.merged(x) if hasattr(self, 'merged') else sum(run(x) for run in self.branches)

    @torch.no_grad()
    def switch_to_deploy(self):
        merged = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, groups=self.groups)
        merged.to(self.branches[0][0].weight)
        merged.bias.zero_()
        merged.weight.zero_()
        for (conv, norm), pad in zip(self.branches, (0, 1)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            merged.weight += nn.functional.pad(conv.weight, [pad] * 4) * scale.view(-1, 1, 1, 1)
            merged.bias += norm.bias + scale * (conv.bias - norm.running_mean)
        self.merged = merged


@pytest.mark.parametrize('groups', [1, 8])
def test_branches_that_become_one(groups):
    model = randomise(Toy(
        lambda net, x: net.pred(net.b(net.own(net.a(x)))), a=Block(3, 8),
        own=OwnBranches(8, 8 if groups > 1 else 6, groups), b=Block(8 if groups > 1 else 6, 4),
        pred=nn.Conv2d(4, 2, 1)))
    units, _ = find_units(model, SIZE)
    remove_channels(model, units, {unit.name: torch.tensor([0, 2]) for unit in units
                                   if unit.size > 2})
    own, conv = model.own, model.own.branches[0][0]
    assert (own.in_channels, own.out_channels, own.groups) == (
        conv.in_channels, conv.out_channels, conv.groups) != (8, 8, groups)
    before = run(model, 16)
    own.double().switch_to_deploy()
    assert difference(before, run(model, 16)) < 1e-9


def test_halves_of_yolov8_are_rounded():
    """Each layer has a multiple of channels, also those that read what it splits off."""
    path = 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py'
    model = randomise(build_detector(load_config(path)))
    before = count_channels(model)
    criterion = dict(type='mmgcp.Random', seed=0)
    after = prune_detector(model, ratio=0.4, round_to=8, criterion=criterion, compensate=False,
                           input_shape=(3, 64, 64)).channels_after
    uneven = {name: counts for name, counts in after.items()
              if any(new % 8 and new != old for new, old in zip(counts, before[name]))}
    assert after != before and uneven == {}
    halves = [layer for layer in model.modules() if hasattr(layer, 'mid_channels')]
    assert any(2 * layer.mid_channels != layer.main_conv.conv.out_channels for layer in halves)
