# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""LCP, and what it has in common with DCP."""
import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from auxiliary_toys import (
    BOXES,
    begun,
    changed,
    make_batches,
    mmdet_samples,
    mmyolo_samples,
    state_of,
    tiny_detector,
    total_loss,
)
from families import family_config
from mmengine.registry import DefaultScope
from pruning_samples import Block, Toy, randomise
from scripts import ROOT
from tiers import slow_except
from yolov4_samples import build, yolov4

from mmgcp.errors import PruningError
from mmgcp.nn.layers import keep_channels
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import prune
from mmgcp.pruning.compensation.folding import compensate
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layerwise import LCP
from mmgcp.pruning.layerwise.consumers import ConsumerKernels
from mmgcp.pruning.surgery import channels_off
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import build_detector, load_config

SHAPE = (3, 16, 16)


def images_of(number=2, shape=SHAPE, seed=0):
    """Batches of zero-mean images without objects, for criteria without networks."""
    generator = torch.Generator().manual_seed(seed)
    return [Batch(torch.randn(4, *shape, generator=generator), []) for _ in range(number)]


def reconstruction(**kwargs):
    return LCP(alpha=0, **kwargs)


def units_of(model, shape=SHAPE):
    return {unit.name: unit for unit in find_units(model, shape)[0]}


def test_score_is_the_gradient_of_the_joint_loss_without_any_channel():
    """Against a forward pass and a loss written down by hand."""
    model, units = tiny_detector()
    batches, unit = make_batches(), units['stem.conv']
    criterion = begun(LCP(alpha=0.7, aux_epochs=1, joint_lr=0), model, units.values(), batches)
    before = state_of(model)
    found = criterion.score(model, unit, batches)
    assert not changed(model, before)

    network = criterion.auxiliaries['stem.conv'].network
    weight, total = model.body.conv.weight.detach(), torch.zeros(8, 6, 3, 3)
    for batch in batches:
        with torch.no_grad():
            inputs = model.stem(batch.images)
            original = F.conv2d(inputs, weight, padding=1)
        empty = torch.zeros_like(weight).requires_grad_()
        output = F.conv2d(inputs, empty, padding=1)
        assert output.shape == (2, 8, 16, 16)
        loss = (output - original).square().sum() / (2 * 8 * 16 * 16)
        loss = loss + 0.7 * network.loss(output, criterion.find_targets(model, batch))
        total += torch.autograd.grad(loss, empty)[0] / 2
    expected = total.square().sum((0, 2, 3)).double()
    assert found.shape == (6, ) and expected.min() > 0
    assert torch.allclose(found, expected, rtol=1e-4)


def test_kernels_of_all_consumers_add_up():
    """A concatenation has two consumers."""
    def run(net, x):
        x = torch.cat((net.a(x), net.b(x)), 1)
        return net.first(x), net.second(F.max_pool2d(x, 2))

    model = randomise(Toy(run, a=Block(3, 4), b=Block(3, 5, 3), first=nn.Conv2d(9, 2, 3, padding=1),
                          second=nn.Conv2d(9, 3, 1))).eval()
    units, batches = units_of(model), images_of(1)
    criterion = begun(reconstruction(), model, units.values(), batches)
    found = criterion.score(model, units['b.conv'], batches)

    with torch.no_grad():
        x = torch.cat((model.a(batches[0].images), model.b(batches[0].images)), 1)
    maps, expected = (x, F.max_pool2d(x, 2)), torch.zeros(5)
    for layer, values in zip((model.first, model.second), maps):
        weight = layer.weight.detach().clone()
        weight[:, 4:] = 0
        weight.requires_grad_()
        loss = F.mse_loss(F.conv2d(values, weight, layer.bias.detach(), padding=layer.padding),
                          layer(values).detach())
        gradient, = torch.autograd.grad(loss, weight)
        expected += gradient[:, 4:].square().sum((0, 2, 3))
    assert torch.allclose(found.float(), expected, rtol=1e-4)


LAYERS = dict(
    conv=(nn.Conv2d(6, 4, 3), (2, 6, 5, 5)), grouped=(nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    transposed=(nn.ConvTranspose2d(6, 4, 2), (2, 6, 5, 5)),
    grouped_transposed=(nn.ConvTranspose2d(6, 4, 2, groups=2), (2, 6, 5, 5)),
    linear=(nn.Linear(6, 4), (2, 6)))


@pytest.mark.parametrize('kind', LAYERS)
def test_kernels_of_all_layers(kind):
    """A masked weight computes what the layer does with inputs set to zero."""
    layer, shape = LAYERS[kind]
    model, values = nn.Sequential(layer), torch.randn(shape)
    item = ChannelSlice('0', 'in', torch.tensor([1, 3, 4, 5]), torch.tensor([0, 0, 1, 2]))
    kernels = ConsumerKernels(model, ChannelUnit('unit', 3, (item, )), ['0'])
    mask, = kernels.masks(torch.tensor([True, False, True]))
    expected = layer(values.index_fill(1, torch.tensor([4]), 0))
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(mask)
        assert torch.allclose(layer(values), expected, atol=1e-6)
        layer.weight.copy_(weight)
    squares = []
    for channels in ([1, 3], [4], [5]):  # by what is lost without them
        mask, = kernels.masks(torch.tensor([channels != other for other in ([1, 3], [4], [5])]))
        squares.append(weight.masked_fill(mask.expand_as(weight), 0).double().square().sum())
    assert torch.allclose(kernels.norms([weight]), torch.stack(squares))


def test_dead_channels_have_no_score():
    model, units = tiny_detector()
    with torch.no_grad():  # LeakyReLU(0) is 0
        for channel in (1, 4):
            model.stem.bn.weight[channel] = model.stem.bn.bias[channel] = 0
    batches = make_batches()
    for rounds in (1, 3):
        # joint training would bring them back to life
        criterion = begun(LCP(aux_epochs=1, joint_lr=0, rounds=rounds), model, units.values(),
                          batches)
        scores = criterion.score(model, units['stem.conv'], batches)
        assert set(scores.argsort()[:2].tolist()) == {1, 4}
        assert scores[[1, 4]].tolist() == [0, 0] and scores[[0, 2, 3, 5]].min() > 0


def independent_toy(kernel):
    """Channels of noise that do not depend on each other, and a 1x1 layer that reads them."""
    kernel = torch.tensor(kernel)
    model = Toy(lambda net, x: net.pred(net.read(net.make(x))),
                make=nn.Conv2d(len(kernel), len(kernel), 1), read=nn.Conv2d(len(kernel), 3, 1),
                pred=nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model.make.weight.copy_(torch.eye(len(kernel))[..., None, None])
        model.make.bias.zero_()
        model.read.weight.copy_(kernel.expand(3, -1)[..., None, None])
    return model, (len(kernel), 16, 16)


def test_channels_that_nobody_reads_go_first():
    model, shape = independent_toy([1., 0., -1.5, 2., 0., 0.5])
    units, batches = units_of(model, shape), images_of(4, shape)
    for rounds in (1, 3):
        criterion = begun(reconstruction(rounds=rounds), model, units.values(), batches)
        order = criterion.score(model, units['make'], batches).argsort().tolist()
        assert set(order[:2]) == {1, 4} and order[2:] == [5, 0, 2, 3]


def test_rounds_see_that_a_channel_is_a_copy():
    """In one round both of two equal channels come first, in two only one of them."""
    model, shape = independent_toy([2., 2., 1.])
    with torch.no_grad():
        model.make.weight[1] = model.make.weight[0]
    units, batches = units_of(model, shape), images_of(4, shape)
    ranks = {}
    for rounds in (1, 3):
        criterion = begun(reconstruction(rounds=rounds, round_epochs=60, lr=0.2, lr_steps=()),
                          model, units.values(), batches)
        before = state_of(model)
        scores = criterion.score(model, units['make'], batches)
        assert not changed(model, before)
        ranks[rounds] = scores.argsort(descending=True).tolist()
    assert set(ranks[1][:2]) == {0, 1} and ranks[1][2] == 2
    assert ranks[3] == [0, 2, 1]
    assert 2 < scores[0] <= 2.5 and 1 < scores[2] <= 1.5 and 0 <= scores[1] <= 0.5


def test_update_fits_the_kernels_that_are_kept():
    model, units = tiny_detector()
    batches, unit = make_batches(), units['stem.conv']
    criterion = begun(LCP(aux_epochs=2, epochs=8, lr=3e-3), model, units.values(), batches)
    removed = torch.tensor([0, 3])
    before = state_of(model)
    with channels_off(model, [unit], {'stem.conv': removed}):
        start, off = total_loss(criterion, model, unit, batches), state_of(model)
        criterion.update(model, unit, removed, batches)
        assert changed(model, off) == ['body.conv.weight']
        assert total_loss(criterion, model, unit, batches) < start
    assert changed(model, before) == ['body.conv.weight']
    difference = model.body.conv.weight.detach() - before[0]['body.conv.weight']
    moved = difference.abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [False, True, True, False, True, True]


def test_gradients_are_as_before():
    """Those that the parameters had are neither used nor changed."""
    results = []
    for has_gradients in (False, True):
        model, units = tiny_detector()
        batches, unit, gradients = make_batches(), units['stem.conv'], {}
        if has_gradients:
            gradients = {name: torch.ones_like(param) for name, param in model.named_parameters()}
            for name, param in model.named_parameters():
                param.grad = gradients[name]
        criterion = begun(LCP(aux_epochs=1, epochs=2, rounds=2), model, units.values(), batches)
        results.append(criterion.score(model, unit, batches))
        criterion.update(model, unit, torch.tensor([0, 3]), batches)
        for name, param in model.named_parameters():
            assert param.grad is gradients.get(name)
            assert param.grad is None or param.grad.eq(1).all()
        results.append(model.body.conv.weight.detach())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize('scale, clipped', [(1., False), (1000., True)])
def test_fitting_is_momentum_sgd_with_steps_of_the_learning_rate(scale, clipped):
    """Against an optimizer written down by hand, which clips gradients to a norm of 10."""
    model, shape = independent_toy([scale, 2 * scale, -scale, 0.5 * scale])
    units, batches = units_of(model, shape), images_of(2, shape)
    criterion = begun(reconstruction(epochs=4, lr=0.03, lr_steps=(1, 3), momentum=0.8), model,
                      units.values(), batches)
    norms = []
    weight = before = model.read.weight.detach().clone()
    velocity, keep = torch.zeros_like(weight), torch.tensor([0., 1, 1, 1]).view(1, 4, 1, 1)
    for lr in (0.03, 3e-3, 3e-3, 3e-4):
        for batch in batches:
            kernel = weight.clone().requires_grad_()
            with torch.no_grad():
                inputs, expected = batch.images, model.read(batch.images)
            output = F.conv2d(inputs * keep.view(1, 4, 1, 1), kernel, model.read.bias.detach())
            gradient, = torch.autograd.grad((output - expected).square().mean(), kernel)
            norm = float((gradient * keep).norm())
            norms.append(norm)
            velocity = 0.8 * velocity + gradient * keep * min(1, 10 / max(norm, 1e-12))
            weight = weight - lr * velocity
    with channels_off(model, units.values(), {'make': torch.tensor([0])}):
        criterion.update(model, units['make'], torch.tensor([0]), batches)
    assert torch.allclose(model.read.weight, weight, atol=1e-6)
    assert not torch.equal(weight, before) and (max(norms) > 10) == clipped


def test_reconstruction_is_almost_perfect_where_it_can_be():
    """The removed channel is a copy of another one, which can take its place."""
    model, shape = independent_toy([1., 2., 1.])
    with torch.no_grad():
        model.make.weight[1] = model.make.weight[0]
    units, batches = units_of(model, shape), images_of(2, shape)
    criterion = begun(reconstruction(epochs=50, lr=0.1, lr_steps=(40, )), model, units.values(),
                      batches)
    with channels_off(model, units.values(), {'make': torch.tensor([1])}):
        start = total_loss(criterion, model, units['make'], batches)
        criterion.update(model, units['make'], torch.tensor([1]), batches)
        assert total_loss(criterion, model, units['make'], batches) < 1e-3 * start
    assert torch.allclose(model.read.weight[:, 0], torch.tensor(3.), atol=0.05)


def test_update_that_fails_is_taken_back():
    model, units = tiny_detector()
    batches, unit = make_batches(), units['stem.conv']
    criterion = begun(reconstruction(lr=1e4, epochs=3), model, units.values(), batches)
    before = state_of(model)
    with channels_off(model, [unit], {'stem.conv': torch.tensor([0])}):
        with pytest.warns(UserWarning, match='read stem.conv did not lower .* relative=True'):
            criterion.update(model, unit, torch.tensor([0]), batches)
    assert not changed(model, before)


@pytest.mark.parametrize('norm', [True, False])
def test_what_is_folded_is_no_error(norm):
    """A constant channel, which a BatchNorm or a bias takes over."""
    layers = dict(make=Block(3, 5), pred=nn.Conv2d(4, 2, 1),
                  read=Block(5, 4) if norm else nn.Conv2d(5, 4, 1))
    model = randomise(Toy(lambda net, x: net.pred(net.read(net.make(x))), **layers)).eval()
    with torch.no_grad():
        model.make.bn.weight[2], model.make.bn.bias[2] = 0, 3.
    units, batches = units_of(model), images_of()
    criterion = begun(reconstruction(), model, units.values(), batches)
    unit, removed = units['make.conv'], {'make.conv': torch.tensor([2])}
    with channels_off(model, [unit], removed):
        assert total_loss(criterion, model, unit, batches) > 0.1
    criterion.folded = True
    assert criterion.score(model, unit, batches).argmin() == 2
    compensate(model, units.values(), removed, [batch.images for batch in batches])
    with channels_off(model, [unit], removed):
        assert total_loss(criterion, model, unit, batches) < 1e-8


def test_relative_reconstruction():
    model, units = tiny_detector()
    batch, unit = make_batches(1)[0], units['stem.conv']
    losses = []
    for relative in (False, True):
        criterion = begun(reconstruction(relative=relative), model, units.values(), [batch])
        with channels_off(model, [unit], {'stem.conv': torch.tensor([0, 1])}):
            losses.append(total_loss(criterion, model, unit, [batch]))
    with torch.no_grad():
        scale = model.body.conv(model.stem(batch.images)).square().mean()
    assert losses[1] == pytest.approx(losses[0] / float(scale), rel=1e-4)


def go_on(criterion, model, unit, batches):
    """Score and update a unit; return the scores."""
    scores = criterion.score(model, unit, batches)
    removed = scores.argsort()[:2].sort().values
    with channels_off(model, [unit], {unit.name: removed}):
        criterion.update(model, unit, removed, batches)
    return scores, removed


def test_resuming_is_exact():
    """From a file, on a model whose channels are already off."""
    model, units = tiny_detector()
    batches = make_batches()
    criterion = begun(LCP(aux_epochs=2, epochs=2), model, units.values(), batches)
    _, removed = go_on(criterion, model, units['stem.conv'], batches)
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), criterion=criterion.state_dict()), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    other, _ = tiny_detector()
    other.load_state_dict(state['model'])
    resumed = LCP(aux_epochs=2, epochs=2)
    resumed.load_state_dict(state['criterion'])
    results = []
    for net, current in ((model, criterion), (other, resumed)):
        with channels_off(net, units.values(), {'stem.conv': removed}):
            results.append(go_on(current, net, units['body.conv'], batches)[0])
    assert torch.equal(*results)
    assert all(torch.equal(value, model.state_dict()[name])
               for name, value in other.state_dict().items())
    again = resumed.state_dict()
    assert again['auxiliaries'].keys() == state['criterion']['auxiliaries'].keys()
    original = state['criterion']['reconstructor']['weights']
    assert all(torch.equal(value, original[name])
               for name, value in again['reconstructor']['weights'].items())


def test_errors():
    model, units = tiny_detector()
    with pytest.raises(PruningError, match='has not begun'):
        LCP().score(model, units['stem.conv'], make_batches())
    with pytest.raises(PruningError, match='there are no batches'):
        begun(LCP(), model, units.values(), [])
    with pytest.raises(PruningError, match='rounds must be .* but is 0'):
        LCP(rounds=0)
    with pytest.raises(PruningError, match='needs a detector whose head has num_classes'):
        begun(LCP(), randomise(Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4),
                                   b=nn.Conv2d(4, 2, 1))), [], images_of())


def narrow_ssd():
    """SSD300 with a VGG-16 of a sixteenth of the width."""
    cfg = load_config('mmdet::pascal_voc/ssd300_voc0712.py', {
        'model.backbone.init_cfg': None, 'model.bbox_head.num_classes': 3})
    model = build_detector(cfg)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            if name != 'backbone.features.0':
                keep_channels(model, name, 'in', torch.arange(layer.in_channels // 16))
            if not name.startswith('bbox_head'):
                keep_channels(model, name, 'out', torch.arange(layer.out_channels // 16))
    keep_channels(model, 'neck.l2_norm.weight', 'out', torch.arange(32))
    return randomise(model)


def resnet_ssd():
    """Our config, with a ResNet-18."""
    channels = (128, 256, 64, 32, 32, 32)
    cfg = load_config(str(ROOT / 'configs/ssd/ssd300_r50_1xb32-120k_voc0712.py'), {
        'model.backbone.depth': 18, 'model.backbone.init_cfg': None,
        'model.neck.in_channels': channels[:2], 'model.neck.out_channels': channels,
        'model.bbox_head.in_channels': channels, 'model.bbox_head.num_classes': 3})
    return randomise(build_detector(cfg))


def yolov8():
    cfg = family_config('yolov8-n')
    cfg.merge_from_dict({f'model.{part}.widen_factor': 0.125
                         for part in ('backbone', 'neck', 'bbox_head.head_module')})
    return randomise(build_detector(cfg))


# Detector, layers to prune, form and size of the data
DETECTORS = dict(
    ssd_vgg=(narrow_ssd, ['backbone.features.1[49]', 'backbone.features.21'], mmdet_samples, 300),
    ssd_resnet=(resnet_ssd, ['backbone.layer2.1.conv1', 'neck.extra_layers.3.1'], mmdet_samples,
                300),
    yolov4=(lambda: build(yolov4()), ['neck.reduce_layers', 'backbone.stage2.0'], mmyolo_samples,
            64),
    yolov8=(yolov8, ['backbone.stage2.0', 'bbox_head.head_module.reg_preds.1.0'], mmyolo_samples,
            64))


@pytest.mark.parametrize('name', slow_except(['ssd_vgg', 'yolov4'], DETECTORS))
def test_detectors(name):
    """The whole of prune(), as tools/prune.py calls it."""
    make, modules, samples, size = DETECTORS[name]
    model = make()
    boxes = BOXES.clone()
    boxes[:, 2:] *= size / 32
    batches = make_batches(1, samples, size, boxes=boxes)
    layers = set(model.state_dict())
    before = sum(param.numel() for param in model.parameters())
    found = []

    class Spy(LCP):
        """Remembers its networks and their targets."""

        def begin(self, model, *args):
            super().begin(model, *args)
            found.append((self.auxiliaries, self.find_targets(model, batches[0])))

    with DefaultScope.overwrite_default_scope('mmdet' if 'ssd' in name else 'mmyolo'):
        TASK_UTILS.register_module(module=Spy, force=True)
        result = prune(
            model, groups=[dict(name='some', modules=modules, ratio=0.5)], batches=batches,
            criterion=dict(type='mmgcp.Spy', aux_epochs=1, epochs=1, lr=1e-5, relative=True),
            input_shape=(3, size, size))
    (auxiliaries, targets), = found
    assert len(auxiliaries) >= 1 and len(targets) >= 3
    assert set(model.state_dict()) == layers
    assert sum(param.numel() for param in model.parameters()) == result.params[1] < before
    assert sum(len(channels) for channels in result.plan.removed().values()) >= 2
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).eval()(batches[0].images,
                                                          mode='tensor')[0][0]).all()
