# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The criteria of losses against gates that are written into networks by hand."""
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from families import family_config
from loss_toys import (
    SHAPE,
    TOYS,
    LossToy,
    assert_as_before,
    make_batches,
    make_toy,
    prepared,
    silent,
    snapshot,
)
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pruning_samples import Block, Toy, randomise
from yolov4_samples import batch

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch, loss_mode
from mmgcp.pruning import ChannelSlice, ChannelUnit
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scores import GroupFisher, Taylor
from mmgcp.pruning.scores.channel_gates import ChannelGates
from mmgcp.pruning.scores.gradients import squared_gradients
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import build_detector

CRITERIA = (Taylor, GroupFisher)


def gate(x, gates):
    return x * gates[:, None, None]


def gated_chain(net, x, gates):
    x = gate(net.a(x), gates['a.conv'])
    return [net.pred(gate(net.b(x), gates['b.conv']))]


def gated_residual(net, x, gates):
    x = net.stem(x)
    inside = gate(net.a(gate(x, gates['stem.conv'])), gates['a.conv'])
    return [net.pred(gate(x + net.b(inside), gates['stem.conv']))]


def gated_concat(net, x, gates):
    x = torch.cat((gate(net.a(x), gates['a.conv']), gate(net.b(x), gates['b.conv'])), 1)
    return [net.first(x), net.second(F.max_pool2d(x, 2))]


def gated_repeated(net, x, gates):
    x = net.a(x)
    levels = [gate(net.shared(gate(level, gates['a.conv'])), gates['shared.conv'])
              for level in (x, F.max_pool2d(x, 2))]
    return [net.pred(levels[0]), net.linear(levels[1].flatten(1))]


GATED = dict(chain=gated_chain, residual=gated_residual, concat=gated_concat,
             repeated=gated_repeated)


def loss_by_hand(name, model, image, target, gates):
    """The loss of one image (C, H, W)."""
    outputs = GATED[name](model, image[None], gates)
    return sum((output - target).square().mean() for output in outputs)


def derivatives_by_hand(name, model, units, batches):
    """Derivatives (N, C) for the gates, of one image after the other."""
    found = {unit.name: [] for unit in units}
    for images, samples in batches:
        for image, target in zip(images, samples['targets']):
            gates = {unit.name: torch.ones(unit.size).double().requires_grad_()
                     for unit in units}
            loss = loss_by_hand(name, model, image, target, gates)
            for key, value in zip(gates, torch.autograd.grad(loss, list(gates.values()))):
                found[key].append(value)
    return {key: torch.stack(values) for key, values in found.items()}


def relative(values):
    """In relation to the mean of all channels of all units."""
    mean = torch.cat(list(values.values())).mean()
    return {name: (value / mean).tolist() for name, value in values.items()}


def assert_scores(found, expected):
    assert {name: list(scores) for name, scores in found.items()} == {
        name: [name] for name in expected}
    for name, values in relative(expected).items():
        assert found[name][name].tolist() == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize('name', TOYS)
def test_gates_by_hand(name):
    """Each image's derivatives, in batches of any size."""
    model, units = make_toy(name)
    batches = make_batches(3, 1, 2)
    expected = derivatives_by_hand(name, model, units, batches)
    gates = ChannelGates(model, units)
    with loss_mode(model):
        found = [gates.gradients(batch) for batch in batches]
    assert all(list(item) for item in found)
    for key, values in expected.items():
        assert values.abs().min() > 1e-6  # or else this test shows little
        assert torch.allclose(torch.cat([item[key] for item in found]), values, rtol=1e-10)


@pytest.mark.parametrize('name', TOYS)
def test_derivatives_are_differences_of_losses(name):
    """Of the network of the hand-written gates, which is the network itself at one."""
    model, units = make_toy(name)
    batches = make_batches(1)
    (images, samples), = batches
    derivatives = derivatives_by_hand(name, model, units, batches)
    ones = {unit.name: torch.ones(unit.size).double() for unit in units}

    def loss(gates):
        with torch.no_grad():
            return float(loss_by_hand(name, model, images[0], samples['targets'][0], gates))

    with torch.enable_grad():
        own = model.parse_losses(model(images, samples, mode='loss'))[0]
    assert loss(ones) == pytest.approx(float(own), rel=1e-12)
    for key, values in ones.items():
        for channel in range(len(values)):
            step = 1e-5 * F.one_hot(torch.tensor(channel), len(values))
            slope = (loss({**ones, key: values + step}) - loss({**ones, key: values - step})) / 2e-5
            assert slope == pytest.approx(float(derivatives[key][0, channel]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize('name', TOYS)
def test_taylor_by_hand(name):
    model, units = make_toy(name)
    batches = make_batches(3, 1, 2)
    derivatives = derivatives_by_hand(name, model, units, batches)
    importances = {key: value.square().mean(0) for key, value in derivatives.items()}
    found = prepared(Taylor(), model, units, batches)
    assert_scores(found, {key: value.sqrt() for key, value in importances.items()})


# For an image: elements of all convolutions' outputs that a channel takes, and the MACs
# that it costs. The layers' outputs are 8x8, those of the second layer of the chain 4x4.
SAVED = dict(
    chain=({'a.conv': 64, 'b.conv': 16},
           {'a.conv': 64 * 3 * 9 + 16 * 5 * 9, 'b.conv': 16 * 6 * 9 + 16 * 2}),
    residual=({'stem.conv': 2 * 64, 'a.conv': 64},
              {'stem.conv': 64 * 3 + 64 * 4 * 9 + 64 * 4 + 64 * 2,
               'a.conv': 64 * 6 * 9 + 64 * 6}),
    concat=({'a.conv': 64, 'b.conv': 64},
            {'a.conv': 64 * 3 + 64 * 2 * 9 + 16 * 3, 'b.conv': 64 * 3 * 9 + 64 * 2 * 9 + 16 * 3}),
    repeated=({'a.conv': 64, 'shared.conv': 64 + 16},
              {'a.conv': 64 * 3 + 80 * 5 * 9, 'shared.conv': 80 * 4 * 9 + 64 * 2 + 16 * 3}))


@pytest.mark.parametrize('normalize', [None, 'memory', 'flops'])
@pytest.mark.parametrize('name', TOYS)
def test_fisher_by_hand(name, normalize):
    """Half of the sum of the squared derivatives, one image after the other, for the savings."""
    model, units = make_toy(name)
    batches = make_batches(3, 1, 2)
    derivatives = derivatives_by_hand(name, model, units, batches)
    expected = {}
    for key, value in derivatives.items():
        total = sum(image.square() for image in value) / 2
        saved = 1 if normalize is None else SAVED[name][normalize == 'flops'][key]
        expected[key] = (total / saved).sqrt()
    found = prepared(GroupFisher(normalize), model, units, batches)
    assert_scores(found, expected)


def test_savings_of_depthwise_grouped_and_transposed_convolutions():
    def run(net, x):
        return net.pred(net.up(net.parts(F.relu(net.each(net.a(x))))))

    model = randomise(LossToy(
        run, a=nn.Conv2d(3, 6, 1), each=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        parts=nn.Conv2d(6, 4, 1, groups=2), up=nn.ConvTranspose2d(4, 5, 2, 2),
        pred=nn.Conv2d(5, 2, 1))).double()
    units, _ = find_units(model, SHAPE)
    batches = make_batches(2)
    plain = prepared(GroupFisher(None), model, units, batches)
    saved = dict(
        memory=dict(a=2 * 64, parts=64, up=256),
        flops=dict(a=64 * 3 + 64 * 9 + 64 * 2, parts=64 * 3 + 64 * 5 * 4,
                   up=64 * 4 * 4 + 256 * 2))
    for normalize, amounts in saved.items():
        found = prepared(GroupFisher(normalize), model, units, batches)
        assert_scores(found, {name: plain[name][name] / amount**0.5
                              for name, amount in amounts.items()})


@pytest.mark.parametrize('kind', CRITERIA)
def test_batches_do_not_matter(kind):
    """The loss of the toys is a sum over the images."""
    model, units = make_toy('residual')
    first, *others = [prepared(kind(), model, units, make_batches(*sizes))
                      for sizes in ((6, ), (2, 4), (1, ) * 6)]
    for other in others:
        for name, scores in first.items():
            assert torch.allclose(scores[name], other[name][name], rtol=1e-10)


def test_taylor_and_fisher_without_normalisation_agree():
    model, units = make_toy('residual')
    first, second = (prepared(kind, model, units, make_batches(4))
                     for kind in (Taylor(), GroupFisher(None)))
    for name, scores in first.items():
        assert torch.allclose(scores[name], second[name][name], rtol=1e-10)


@pytest.mark.parametrize('kind', CRITERIA)
def test_model_stays_and_second_run_is_the_same(kind):
    model, units = make_toy('repeated', double=False)
    model.train()
    model.a.eval()
    model.a.conv.weight.requires_grad = False
    model.pred.bias.grad = torch.ones_like(model.pred.bias)
    before = snapshot(model)
    with torch.no_grad():  # as a caller may have it
        first, second = (prepared(kind(), model, units, make_batches(3, 3))
                         for _ in range(2))
    assert_as_before(model, before)
    assert model.a.conv.weight.grad is None
    assert all(torch.equal(values, second[name][name])
               for name, scores in first.items() for values in scores.values())


def rois_toy():
    """With two regions an image behind a."""
    def run(net, x):
        x = net.a(x)
        return net.pred(net.b(torch.cat((x[..., :4], x[..., 4:]), 0)))

    model = randomise(LossToy(run, a=Block(3, 4), b=Block(4, 5, 3), pred=nn.Conv2d(5, 2, 1)))

    def piece(name, side, size):
        return ChannelSlice(name, side, torch.arange(size), torch.arange(size))

    return model.double(), [
        ChannelUnit('a.conv', 4, (piece('a.conv', 'out', 4), piece('b.conv', 'in', 4))),
        ChannelUnit('b.conv', 5, (piece('b.conv', 'out', 5), piece('pred', 'in', 5)))]


def test_regions_have_one_gate_for_the_batch():
    model, units = rois_toy()
    batches = make_batches(2, 3)
    for item in batches:
        item.data_samples['targets'] = item.data_samples['targets'].repeat(2)
    expected = dict.fromkeys(('a.conv', 'b.conv'), 0)
    for images, samples in batches:
        gates = {'a.conv': torch.ones(4).double().requires_grad_(),
                 'b.conv': torch.ones(5).double().requires_grad_()}
        x = model.a.eval()(images)
        x = gate(torch.cat((x[..., :4], x[..., 4:]), 0), gates['a.conv'])
        outputs = model.pred(gate(model.b.eval()(x), gates['b.conv']))
        loss = (outputs.flatten(1) - samples['targets'][:, None]).square().mean(1).sum()
        for name, value in zip(gates, torch.autograd.grad(loss, list(gates.values()))):
            expected[name] = expected[name] + value.square()
    found = prepared(Taylor(), model, units, batches)
    assert_scores(found, {name: value.sqrt() for name, value in expected.items()})


class Loss(Toy):
    """Computes nothing but a loss."""

    def forward(self, images, data_samples, mode):
        assert mode == 'loss'
        return self.run(self, images)

    def parse_losses(self, loss):
        return loss, {}


def reads(name, *consumers, channels=4):
    """A channel unit of four channels, of which the consumers have some."""
    index = torch.arange(4)
    return ChannelUnit(name, 4, (ChannelSlice(name, 'out', index, index), *(
        ChannelSlice(consumer, 'in', index[:channels], index[:channels])
        for consumer in consumers)))


def test_readers_with_and_without_regions():
    """Derivatives of the images and of the regions add up to one for the batch."""
    ones = torch.ones(4).double()

    def run(net, x, gates=ones):
        x = gate(net.a(x), gates)
        regions = torch.cat((x[..., :4], x[..., 4:]), 0)
        return net.whole(x).square().sum() + net.pred(regions).square().sum()

    model = randomise(Loss(run, a=Block(3, 4), whole=nn.Conv2d(4, 2, 1),
                           pred=nn.Conv2d(4, 2, 1))).double().eval()
    item, = make_batches(3)
    sums, images = squared_gradients(model, [reads('a.conv', 'whole', 'pred')], [item], silent)
    gates = ones.clone().requires_grad_()
    expected, = torch.autograd.grad(run(model, item.images, gates), gates)
    assert images == 3 and torch.allclose(sums['a.conv'], expected.square(), rtol=1e-10)


@pytest.mark.parametrize('kind', CRITERIA)
def test_channels_that_the_loss_does_not_see_have_no_scores(kind):
    def run(net, x):
        net.other(net.b(x))  # for nothing
        return net.pred(net.a(x)).square().sum()

    model = randomise(Loss(run, a=Block(3, 4), pred=nn.Conv2d(4, 2, 1), b=Block(3, 4),
                           other=nn.Conv2d(4, 2, 1), c=Block(3, 4))).double()
    units = [reads('a.conv', 'pred', channels=3), reads('b.conv', 'other'), reads('c.conv')]
    found = prepared(kind(), model, units, make_batches(2))
    assert found['b.conv'] == found['c.conv'] == {}
    assert found['a.conv']['a.conv'].isnan().tolist() == [False] * 3 + [True]


@pytest.mark.parametrize('kind', CRITERIA)
def test_loss_that_is_not_finite(kind):
    model, units = make_toy('chain')
    before = snapshot(model)
    batches = make_batches(2, 2)
    batches[1].data_samples['targets'][1] = float('inf')
    with pytest.raises(PruningError, match='the loss of a batch of training data is inf and has '
                       'no finite derivatives'):
        kind().prepare(model, units, batches, silent)
    assert_as_before(model, before)


@pytest.mark.parametrize('kind', CRITERIA)
def test_progress_and_no_batches(kind):
    model, units = make_toy('chain')
    seen = []
    kind().prepare(model, units, make_batches(1, 1), lambda *args: seen.append(args))
    assert seen == [('scoring', done, 2) for done in range(3)]
    with pytest.raises(PruningError, match='there are no batches of training data'):
        kind().prepare(model, units, [], silent)


def test_loss_without_any_channel():
    """All scores are zero then, not undefined."""
    model, units = make_toy('chain')
    nn.init.zeros_(model.pred.weight)
    for kind in CRITERIA:
        found = prepared(kind(), model, units, make_batches(2))
        assert all((scores[name] == 0).all() for name, scores in found.items())


def detector_batch(model, size):
    """Two images of noise with three boxes as a detector's data preprocessor returns them."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[.1, .1, .6, .7], [.3, .4, .9, .9], [0., 0., .3, .25]]) * size
    labels, owners = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 1])
    if type(model).__module__.startswith('mmyolo'):
        targets = torch.cat((owners[:, None], labels[:, None], boxes), 1)
        return Batch(images, dict(bboxes_labels=targets,
                                  img_metas=[dict(batch_input_shape=(size, size))] * 2))
    meta = dict(img_shape=(size, size), pad_shape=(size, size), batch_input_shape=(size, size),
                scale_factor=(1., 1.))
    return Batch(images, [
        DetDataSample(metainfo=meta, gt_instances=InstanceData(
            bboxes=boxes[owners == number], labels=labels[owners == number]))
        for number in range(2)])


def fully_coupled(model, name, *consumers):
    """The unit of all output channels of a layer, which these layers read."""
    index = torch.arange(len(model.get_submodule(name).weight))
    return ChannelUnit(name, len(index), (ChannelSlice(name, 'out', index, index), *(
        ChannelSlice(consumer, 'in', index, index) for consumer in consumers)))


@pytest.mark.parametrize('name', ['yolov8-n', 'rtmdet-tiny', 'yolov6-n'])
def test_detectors(name):
    """Scores of all prunable units, the same at a second run, and the detector stays."""
    torch.manual_seed(0)
    model = randomise(build_detector(family_config(name)))
    units, _ = find_units(model)
    scores = assert_plausible(model, units)
    # the boxes are found on the first level alone, so that the others have none to regress
    useless = {key for key, values in scores.items() if not values.any()}
    assert useless == {key for key in scores if re.search(r'reg_(preds|convs)\.[12]', key)}


def test_two_stage_detector():
    """Of the first stage, which sees images, and of the second, which sees regions."""
    cfg = family_config('faster-rcnn-r50')
    cfg.merge_from_dict({'model.backbone.depth': 18,
                         'model.roi_head.bbox_head.fc_out_channels': 64,
                         'model.neck.in_channels': [64, 128, 256, 512]})
    torch.manual_seed(0)
    model = randomise(build_detector(cfg))
    scores = assert_plausible(model, [
        fully_coupled(model, 'backbone.layer1.0.conv1', 'backbone.layer1.0.conv2'),
        fully_coupled(model, 'rpn_head.rpn_conv', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg'),
        fully_coupled(model, 'roi_head.bbox_head.shared_fcs.0', 'roi_head.bbox_head.shared_fcs.1'),
        fully_coupled(model, 'roi_head.bbox_head.shared_fcs.1', 'roi_head.bbox_head.fc_cls',
                      'roi_head.bbox_head.fc_reg')])
    assert all(values.any() for values in scores.values())


def assert_plausible(model, units):
    before = snapshot(model)
    batches = [detector_batch(model, 128)]
    first, second = (prepared(GroupFisher(), model, units, batches) for _ in range(2))
    assert_as_before(model, before)
    assert all(list(scores) == [key] for key, scores in first.items())
    values = torch.cat([scores[key] for key, scores in first.items()])
    assert values.isfinite().all() and float(values.mean()) == pytest.approx(1.)
    assert (values > 0).double().mean() > 0.5
    assert all(torch.equal(scores[key], second[key][key]) for key, scores in first.items())
    return {key: scores[key] for key, scores in first.items()}


def test_yolov4(model, units):
    batches = [Batch(data['inputs'], data['data_samples']) for data in (
        model.data_preprocessor(batch(seed), True) for seed in range(2))]
    before = snapshot(model)
    found = prepared(Taylor(), model, units, batches)
    assert_as_before(model, before)
    assert set(found) == {unit.name for unit in units}
    assert all(scores[name].isfinite().all() for name, scores in found.items())


def test_options():
    criterion = TASK_UTILS.build(dict(type='mmgcp.Taylor'))
    assert isinstance(criterion, Taylor) and criterion.needs == 'losses'
    criterion = TASK_UTILS.build(dict(type='mmgcp.GroupFisher', normalize='flops'))
    assert (criterion.normalize, criterion.needs) == ('flops', 'losses')
    assert GroupFisher().normalize == 'memory'
    with pytest.raises(PruningError, match="normalize must be one of .*, but is 'params'"):
        GroupFisher('params')
