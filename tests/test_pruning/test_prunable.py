# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors of which only a part can be traced, and units that cannot be removed."""
import copy

import pytest
import torch
import torch.nn as nn
from mmcv.cnn.bricks import ContextBlock, GeneralizedAttention, NonLocal2d
from pruning_samples import Block, Toy, difference, randomise, set_channels

from mmgcp.analysis import count_complexity
from mmgcp.deployment.timing import torch_run
from mmgcp.errors import PruningError
from mmgcp.nn.forward import (
    flatten_tensors,
    head_left_out_on_demand,
    is_head_left_out,
    run_as_tensors,
    working_shape,
)
from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning import prune
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.prunable import find_prunable, shape_or_leave_head_out
from mmgcp.pruning.surgery import channels_off
from mmgcp.sparsity.selection import select_scale_factors
from mmgcp.utils.config import build_detector, drop_pretrained, load_config

SHAPE = (3, 32, 48)


class Headed(nn.Module):
    """A detector with a head that asks for annotations, or does what cannot be followed."""

    def __init__(self, head='annotations', neck=None):
        super().__init__()
        self.backbone = nn.Sequential(Block(3, 8, 3, stride=2), Block(8, 10, 3))
        self.neck = neck or nn.Sequential(Block(10, 12), Block(12, 6))
        self.bbox_head = nn.Sequential(Block(6, 6), nn.Conv2d(6, 4, 1))
        self.head = head

    def extract_feat(self, x):
        x = self.backbone(x)
        return x, self.neck(x)

    def forward(self, x, samples=None, mode='tensor'):
        features = self.extract_feat(x.to(self.bbox_head[1].weight))
        if self.head == 'annotations' and samples is None:
            raise AssertionError  # as of an assert without a message
        elif self.head == 'fails':
            raise self.error
        return self.bbox_head(features[1])

    error = TypeError('the head wants more')


def features(model):
    model = copy.deepcopy(model).double()
    image = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    with eval_mode(model), torch.no_grad():
        return [*model.extract_feat(image), model.bbox_head(model.extract_feat(image)[1])]


@pytest.mark.parametrize('head, reason', [
    ('annotations', 'the model cannot be run on an image alone: AssertionError'),
    ('fails', 'the model cannot be run on an image alone: TypeError: the head wants more')])
def test_backbone_and_neck_are_pruned_without_the_head(head, reason):
    model = randomise(Headed(head))
    other = copy.deepcopy(model)
    result = prune(model, ratio=0.5, compensate=False, input_shape=SHAPE)
    units = {unit.name for unit in find_prunable(other, SHAPE).units}
    assert units == {'backbone.0.conv', 'neck.0.conv'}
    assert set(result.plan.removed()) == units
    assert result.plan.skipped == {
        'backbone.1.conv': 'its outputs are read by what cannot be traced',
        'neck.1.conv': 'its outputs are read by what cannot be traced',
        'bbox_head.0.conv': reason, 'bbox_head.1': reason}
    masked = set_channels(copy.deepcopy(other), find_prunable(other, SHAPE).units,
                          result.plan.removed())
    assert difference(features(model), features(masked)) < 1e-12
    assert difference(features(model), features(other)) > 1e-3
    for detector in (model, other):
        assert not is_head_left_out(detector) and 'head' in vars(detector)
        assert not [key for key in vars(detector) if key.startswith('_mmgcp')]


def test_plan_and_steps_without_the_head():
    model = randomise(Headed())
    others = [copy.deepcopy(model) for _ in range(2)]
    plan = prune(model, ratio=0.5, compensate=False, input_shape=SHAPE).plan
    again = prune(others[0], plan=plan, compensate=False, input_shape=SHAPE)
    assert again.plan == plan and difference(features(model), features(others[0])) == 0
    with pytest.raises(AssertionError):
        others[0](torch.rand(1, *SHAPE))  # as before
    steps = prune(others[1], target_params=0.6, steps=2, input_shape=SHAPE)
    assert steps.plan.removed() and steps.params[1] <= 0.6 * steps.params[0]


def test_scale_factors_without_the_head():
    model = Headed()
    chosen = select_scale_factors(model, 'prunable', groups='auto', input_shape=SHAPE)
    assert [layer.name for layer in chosen.layers] == ['backbone.0.bn', 'neck.0.bn']
    assert not is_head_left_out(model)


class Wants(nn.Module):
    """Runs only on numbers of channels."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, x):
        if x.shape[1] not in self.numbers:
            raise AssertionError
        return x


def test_figures_without_the_head():
    model = Headed()
    with head_left_out_on_demand(model):
        assert tuple(shape_or_leave_head_out(model, SHAPE)) == (3, 128, 128)
        params, macs = count_complexity(model, SHAPE)
        assert torch_run(model, SHAPE)()  # the features that the head reads
    assert params == sum(param.numel() for param in model.parameters())
    assert macs == 16 * 24 * (9 * 3 * 8 + 9 * 8 * 10 + 10 * 12 + 12 * 6)
    assert not is_head_left_out(model)


class Backbone(nn.Module):
    """Its channels are reordered, or read by what wants all of them."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.wants, self.what = nn.Conv2d(3, 6, 1), Wants(6), what

    def forward(self, x):
        x = self.conv(x)
        return x.flip(1) if self.what == 'flip' else self.wants(x)


@pytest.mark.parametrize('what, reason', [('flip', 'its channels are mixed'),
                                          ('wants', 'it cannot be removed: the model then')])
def test_backbone_without_prunable_channels_is_named(what, reason):
    model = randomise(Toy(lambda net, x: net.pred(net.neck(net.backbone(x))),
                          backbone=Backbone(what), neck=Block(6, 8), pred=nn.Conv2d(8, 2, 1)))
    with pytest.warns(UserWarning, match=r'no channel of the backbone \(Backbone\) can be '
                      f'removed: {reason}.* of backbone.conv'):
        assert [unit.name for unit in find_prunable(model, SHAPE).units] == ['neck.conv']


class Unfollowed(nn.Module):
    """What fails with gradients."""

    def forward(self, x):
        return x.numpy() is None or x


@pytest.mark.parametrize('model, message', [
    (Headed('annotations', Unfollowed()), 'cannot be run on an image alone: AssertionError$'),
    (Toy(lambda net, x: Unfollowed()(net.a(x)), a=Block(3, 4)),
     "cannot be traced: RuntimeError: Can't call numpy"),
], ids=['nothing', 'no extract_feat'])
def test_what_cannot_be_traced_at_all_is_one_sentence(model, message):
    state = copy.deepcopy(model.state_dict())
    for action in (lambda: prune(model, ratio=0.5, input_shape=SHAPE),
                   lambda: find_prunable(model, SHAPE)):
        with pytest.raises(PruningError, match=message) as caught:
            action()
        assert '\n' not in str(caught.value) and not is_head_left_out(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def long_toy(bad):
    """Ten layers, of which some emit channels that all have to stay."""
    layers = {f'a{number}': Block(3 if number == 0 else 8, 8) for number in range(10)}

    def forward(net, x):
        for number in range(10):
            x = getattr(net, f'a{number}')(x)
            if number in bad:
                x = net.wants(x)
        return net.pred(x)

    return randomise(Toy(forward, wants=Wants(8), pred=nn.Conv2d(8, 2, 1), **layers))


@pytest.mark.parametrize('bad', [(), (0, ), (9, ), (3, 4), (0, 2, 7, 9), tuple(range(10))])
def test_units_that_cannot_be_removed_are_found(bad):
    model = long_toy(bad)
    state = copy.deepcopy(model.state_dict())
    units, skipped, shape = find_prunable(model, SHAPE)
    assert [unit.name for unit in units] == [f'a{number}.conv' for number in range(10)
                                             if number not in bad]
    assert {name for name, reason in skipped.items() if 'it cannot be removed' in reason} == {
        f'a{number}.{part}' for number in bad for part in ('conv', 'bn')}
    assert all('AssertionError' in skipped[f'a{number}.conv'] for number in bad)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in state.items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert tuple(shape) == (3, 128, 128)


def test_units_that_fail_only_together():
    """The first of them in the model's order is pruned."""
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        assert a.shape[1] == 6 or b.shape[1] == 6
        return net.first(a), net.second(b)

    model = randomise(Toy(forward, a=Block(3, 6), b=Block(3, 6), first=nn.Conv2d(6, 2, 1),
                          second=nn.Conv2d(6, 2, 1)))
    units, skipped, _ = find_prunable(model, SHAPE)
    assert [unit.name for unit in units] == ['a.conv'] and 'b.conv' in skipped


@pytest.mark.parametrize('layer', ['norm', 'conv'])
def test_some_of_channels_that_go_in_groups_are_tried(layer):
    """One whole group of two of a GroupNorm, or one of each pair of a grouped convolution."""
    part = nn.GroupNorm(2, 8) if layer == 'norm' else nn.Conv2d(8, 8, 1, groups=4)
    model = Toy(lambda net, x: net.pred(net.wants(net.part(net.a(x)))), a=nn.Conv2d(3, 8, 1),
                part=part, wants=Wants(8), pred=nn.Conv2d(8, 2, 1))
    units, skipped, _ = find_prunable(randomise(model), SHAPE)
    assert 'it cannot be removed' in skipped['part']
    assert [unit.name for unit in units] == ([] if layer == 'norm' else ['a'])


def test_detector_that_predicts_at_random():
    model = Toy(lambda net, x: net.pred(net.a(x)) + torch.rand(2, 1, 1), a=Block(3, 6),
                pred=nn.Conv2d(6, 2, 1))
    with pytest.raises(PruningError, match='does not predict the same twice'):
        find_prunable(model, SHAPE)


def test_detector_whose_predictions_are_not_finite():
    """As those of weights that are not initialised."""
    model = Toy(lambda net, x: net.pred(net.a(x)) * float('inf'), a=Block(3, 6),
                pred=nn.Conv2d(6, 2, 1))
    with pytest.raises(PruningError, match='the detector predicts values that are not finite, so'):
        find_prunable(model, SHAPE)


def test_rounding_errors_that_decide():
    """Values that are nearly equal are compared: only double precision tells them apart."""
    def forward(net, x):
        x = net.pred(net.a(x))
        step = torch.finfo(x.dtype).eps**0.5  # of the precision that is at work
        return (x * 3 / step).round() % 2

    model = randomise(Toy(forward, a=Block(3, 16, 3), pred=nn.Conv2d(16, 8, 1)))
    with torch.no_grad():
        for param in model.a.bn.parameters():
            param.copy_(torch.linspace(0.5, 1.5, 16))
    units, skipped, _ = find_prunable(model, SHAPE)
    assert [unit.name for unit in units] in (['a.conv'], [])
    assert 'pred' in skipped


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(channels):
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(channels, 6),
                          b=Block(6, 8), pred=nn.Conv2d(8, 2, 1)))
    assert tuple(working_shape(model)) == (channels, 128, 128)
    result = prune(model, ratio=0.5, groups=[dict(name='all', modules=['*'])])
    assert set(result.plan.removed()) == {'a.conv', 'b.conv'}
    assert result.plan.options['input_shape'] == [channels, 640, 640]
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(channels, 6),
                          b=Block(6, 8), pred=nn.Conv2d(8, 2, 1)))
    chosen = select_scale_factors(model, 'prunable', groups='auto')
    assert [layer.name for layer in chosen.layers] == ['a.bn', 'b.bn']


def test_images_of_other_channels_behind_a_focus():
    def forward(net, x):
        x = torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        return net.pred(net.a(x))

    model = Toy(forward, a=Block(16, 6), pred=nn.Conv2d(6, 2, 1))
    assert tuple(working_shape(model, (3, 64, 96))) == (4, 128, 128)


def test_nothing_runs():
    model = Toy(lambda net, x: net.a(x[:, :, :0]), a=nn.Conv2d(3, 2, 3))
    assert working_shape(model, (3, 64, 96)) == (3, 64, 96)
    with pytest.raises(PruningError):
        find_prunable(model, SHAPE)


class OwnAttention(nn.Module):
    """Self-attention of several heads by views, whose sizes it has stored."""

    def __init__(self, channels, heads=2):
        super().__init__()
        self.heads, self.size = heads, channels // heads
        self.mixed = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        query, key, value = self.mixed(x).view(len(x), 3, self.heads, self.size, -1).unbind(1)
        weights = (query.transpose(-2, -1) @ key).softmax(-1)
        return x + self.out((value @ weights.transpose(-2, -1)).reshape(x.shape))


ATTENTION = {
    'non-local': lambda: NonLocal2d(8, reduction=2),
    'non-local-dot': lambda: NonLocal2d(8, reduction=1, mode='dot_product', sub_sample=True),
    'generalized': lambda: GeneralizedAttention(8, num_heads=2, attention_type='1111'),
    'context': lambda: ContextBlock(8, 0.5),
    'own': lambda: OwnAttention(8),
}


@pytest.mark.parametrize('kind', ATTENTION)
def test_attention_by_views(kind):
    """What surrounds it is pruned, exactly; it loses what can be removed."""
    torch.manual_seed(0)
    model = randomise(Toy(
        lambda net, x: net.pred(net.c(net.attention(net.b(net.a(x))))),
        a=Block(3, 6, 3, stride=4), b=Block(6, 8, 3, stride=4), attention=ATTENTION[kind](),
        c=Block(8, 10), pred=nn.Conv2d(10, 2, 1)))
    other = copy.deepcopy(model)
    result = prune(model, ratio=0.5, criterion=dict(type='mmgcp.L1Norm'), compensate=False,
                   groups=[dict(name='all', modules=['*'])], allocation='uniform',
                   input_shape=(3, 64, 64))
    removed = result.plan.removed()
    assert {'a.conv', 'c.conv'} <= set(removed)
    units = find_prunable(other, (3, 64, 64)).units
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad(), channels_off(other.double().eval(), units, removed):
        expected = other(image)
    with torch.no_grad():
        assert difference([model.double().eval()(image)], [expected]) < 1e-9
    convs = {name for name, layer in other.named_modules() if isinstance(layer, nn.Conv2d)}
    named = {item.module for unit in units for item in unit.side('out')}
    assert convs <= named | set(result.plan.skipped)


DETECTORS = {  # the part of the original's parameters that is left, and whose head is left alone
    'detr/detr_r50_8xb2-150e_coco.py': True,
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': False,
    'solo/solo_r50_fpn_1x_coco.py': False,
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': False,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name):
    cfg = load_config(f'mmdet::{name}')
    drop_pretrained(cfg.model)
    for head in cfg.model.get('roi_head', {}).get('bbox_head', []):
        head['fc_out_channels'] = 16
    torch.manual_seed(0)
    model = build_detector(cfg)
    other = copy.deepcopy(model)
    result = prune(model, ratio=0.5, criterion=dict(type='mmgcp.Random', seed=0),
                   allocation='uniform', compensate=False, input_shape=(3, 128, 128))
    assert result.params[1] < 0.7 * result.params[0]
    pruned = {name.split('.')[0] for name in result.changed_channels}
    assert 'backbone' in pruned
    heads = [name for name, reason in result.plan.skipped.items()
             if 'cannot be run on an image alone' in reason]
    assert bool(heads) == DETECTORS[name]
    units, _ = find_units(other, (3, 128, 128)) if not heads else find_prunable(
        other, (3, 128, 128))[:2]
    model.double(), other.double()
    image = torch.rand(1, 3, 128, 128).double()

    def run(net):  # SOLO's suppression of points depends on rounding
        outputs = run_as_tensors(net.eval(), image) if not heads else ()
        return flatten_tensors(net.extract_feat(image) if heads or 'solo' in name else outputs)

    with torch.no_grad(), channels_off(other, units, result.plan.removed()):
        expected = run(other)
    with torch.no_grad():
        for one, two in zip(run(model), expected):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
