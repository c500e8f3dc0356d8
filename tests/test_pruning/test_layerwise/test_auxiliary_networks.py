# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The auxiliary networks: their targets, their losses, and their training."""
import math

import pytest
import torch
import torch.nn as nn
from auxiliary_toys import (
    BOXES,
    TinyDetector,
    begun,
    changed,
    make_batches,
    mmdet_samples,
    mmyolo_samples,
    silent,
    state_of,
    tiny_detector,
)
from mmdet.models.task_modules.prior_generators import (
    MlvlPointGenerator,
    SSDAnchorGenerator,
    YOLOAnchorGenerator,
)
from mmdet.structures.bbox import HorizontalBoxes

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise import DCP, LCP
from mmgcp.pruning.layerwise.auxiliary.targets import (
    Positives,
    PriorBoxes,
    classes_of,
    dense_head,
    find_positives,
    match,
    read_ground_truth,
    thin_out,
)
from mmgcp.pruning.layerwise.dcp import PresenceNetwork
from mmgcp.pruning.layerwise.lcp import LocalizationNetwork

SSD = SSDAnchorGenerator(strides=[8, 16], ratios=[[2], [2, 3]], input_size=64, scale_major=False,
                         min_sizes=[16, 32], max_sizes=[32, 48])
YOLO = YOLOAnchorGenerator([8, 16], [[(10, 13), (16, 30)], [(30, 20), (45, 60)]])


def iou(first, second):
    """The IoU and the generalised IoU of two boxes, in plain Python."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - both
    hull = ((max(first[2], second[2]) - min(first[0], second[0]))
            * (max(first[3], second[3]) - min(first[1], second[1])))
    return both / union, both / union - (hull - union) / hull


def brute_match(priors, boxes, threshold):
    ious = [[iou(box, prior)[0] for prior in priors.tolist()] for box in boxes.tolist()]
    pairs = set()
    for number in range(len(priors)):
        column = [row[number] for row in ious]
        if max(column) >= threshold:
            pairs.add((column.index(max(column)), number))
    for owner, row in enumerate(ious):
        if owner not in {pair[0] for pair in pairs}:
            pairs.add((owner, row.index(max(row))))
    return sorted(map(list, pairs))


def random_boxes(number, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 4, generator=generator) * 40
    return torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:] + 4), 1)


@pytest.mark.parametrize('generator', [SSD, YOLO], ids=['ssd', 'yolo'])
@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.95])
def test_matches_are_those_of_brute_force(generator, threshold):
    priors = torch.cat(generator.grid_priors([(8, 8), (4, 4)], device='cpu'))
    # anchors of the same area that hold an object overlap it equally
    priors += torch.rand(priors.shape, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        boxes = random_boxes(5, seed)
        pairs = match(priors, boxes, threshold)
        assert pairs.tolist() == brute_match(priors, boxes, threshold)
        assert set(pairs[:, 0].tolist()) == set(range(5))


def test_no_objects_no_matches():
    priors = torch.cat(YOLO.grid_priors([(8, 8), (4, 4)], device='cpu'))
    assert match(priors, torch.zeros(0, 4), 0.5).shape == (0, 2)
    far = torch.tensor([[900., 900., 910., 910.]])
    assert match(priors, far, 0.5).shape == (0, 2)


def test_ground_truth_of_both_packages():
    images = torch.rand(2, 3, 32, 32)
    boxed = mmdet_samples()
    for sample in boxed:
        sample.gt_instances.bboxes = HorizontalBoxes(sample.gt_instances.bboxes)
    for samples in (mmyolo_samples(), mmdet_samples(), boxed):
        first, second = read_ground_truth(Batch(images, samples))
        assert torch.equal(first.boxes, BOXES[:1, 2:]) and first.labels.tolist() == [1]
        assert torch.equal(second.boxes, BOXES[1:, 2:]) and second.labels.tolist() == [2, 0]
        assert second.labels.dtype == torch.long


def test_boxes_without_area_are_left_out():
    boxes = torch.tensor([[0, 1, 4, 4, 4, 20], [0, 2, 1, 1, 9, 9], [0, 0, 5, 5, 9, 5.]])
    first, second = read_ground_truth(Batch(torch.rand(2, 3, 32, 32), mmyolo_samples(boxes)))
    assert first.labels.tolist() == [2] and len(second.boxes) == 0


def test_positives():
    batch, = make_batches(1)
    priors = torch.cat(YOLO.grid_priors([(4, 4), (2, 2)], device='cpu'))
    found = find_positives(priors, batch, threshold=0.4)
    expected = [[image, *pair] for image in range(2) for pair in match(
        priors, BOXES[BOXES[:, 0] == image, 2:], 0.4).tolist()]
    rows = [int(BOXES[:, 0].tolist().index(image)) + owner for image, owner, _ in expected]
    assert found.images.tolist() == [image for image, _, _ in expected]
    assert torch.equal(found.priors, priors[[number for _, _, number in expected]])
    assert torch.equal(found.boxes, BOXES[rows, 2:])
    assert torch.equal(found.labels, BOXES[rows, 1].long())
    assert found.image_size == (32, 32) and len(found) > 3


def test_limit_of_positives():
    batch, = make_batches(1)
    priors = torch.cat(YOLO.grid_priors([(4, 4), (2, 2)], device='cpu'))
    everything = find_positives(priors, batch, 0.1, max_positives=10**6)
    few = find_positives(priors, batch, 0.1, max_positives=4)
    assert everything.images.bincount().min() > 4 and few.images.bincount().tolist() == [4, 4]
    assert set(few.labels.tolist()) == {0, 1, 2}
    again = find_positives(priors, batch, 0.1, max_positives=4)
    assert torch.equal(few.priors, again.priors)


def test_thinning_out():
    rows = torch.arange(10)[:, None]
    assert thin_out(rows, 3).flatten().tolist() == [0, 4, 9]
    assert thin_out(rows, 10) is rows and thin_out(rows, 11) is rows


def test_points_get_squares():
    model = TinyDetector()
    model.bbox_head.prior_generator = MlvlPointGenerator([2])
    boxes = PriorBoxes(point_scales=(2, 5))(model, torch.rand(1, 3, 8, 6))
    assert boxes.shape == (2 * 4 * 3, 4)
    assert boxes[0].tolist() == [-1, -1, 3, 3] and boxes[12].tolist() == [-4, -4, 6, 6]
    assert boxes[1].tolist() == [1, -1, 5, 3]


def test_priors_follow_the_size_of_the_images():
    model = TinyDetector()
    priors = PriorBoxes()
    for height, width in ((8, 6), (16, 6), (8, 6)):
        expected = model.bbox_head.prior_generator.grid_priors([(height // 2, 3)], device='cpu')
        assert torch.equal(priors(model, torch.rand(1, 3, height, width)), expected[0])


def test_detectors_without_priors_or_classes():
    model = TinyDetector()
    model.bbox_head.prior_generator = SSD
    with pytest.raises(PruningError, match='priors for 2 levels, but gets 1 feature maps'):
        PriorBoxes()(model, torch.rand(1, 3, 8, 8))
    with pytest.raises(PruningError, match='anchors or points .*the Linear has none'):
        dense_head(nn.Linear(1, 1))
    with pytest.raises(PruningError, match='num_classes, but the Linear has none'):
        classes_of(nn.Linear(1, 1))


def localization_network():
    torch.manual_seed(0)
    network = LocalizationNetwork(5, 3, roi_size=3, width=4).eval()
    positives = Positives(
        torch.tensor([0, 1]), torch.tensor([[2., 4., 10., 12.], [5., 5., 25., 15.]]),
        torch.tensor([[6., 2., 14., 9.], [8., 7., 20., 12.]]), torch.tensor([2, 0]), (32, 32))
    return network, torch.randn(2, 5, 16, 16), positives


def test_localization_loss_by_hand():
    """Cross-entropy + 50 * (1 - GIoU), the boxes decoded as SSD's."""
    network, feature, positives = localization_network()
    deltas = []
    network.regressor.register_forward_hook(lambda _, __, output: deltas.extend(output.tolist()))
    scores, _ = network(feature, positives)
    expected = 0.
    for row, delta, prior, box, label in zip(
            scores.tolist(), deltas, positives.priors.tolist(), positives.boxes.tolist(),
            positives.labels.tolist()):
        width, height = prior[2] - prior[0], prior[3] - prior[1]
        x = prior[0] + width / 2 + 0.1 * delta[0] * width
        y = prior[1] + height / 2 + 0.1 * delta[1] * height
        width, height = width * math.exp(0.2 * delta[2]), height * math.exp(0.2 * delta[3])
        decoded = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        entropy = math.log(sum(map(math.exp, row))) - row[label]
        expected += (entropy + 50 * (1 - iou(decoded, box)[1])) / 2
    assert float(network.loss(feature, positives)) == pytest.approx(expected, rel=1e-5)
    entropy = nn.functional.cross_entropy(scores, positives.labels)
    network.box_weight = 0
    assert torch.allclose(network.loss(feature, positives), entropy)


def test_loss_is_zero_without_positives():
    network, feature, positives = localization_network()
    none = Positives(*(value[:0] for value in (positives.images, positives.priors,
                                               positives.boxes, positives.labels)), (32, 32))
    loss = network.loss(feature.requires_grad_(), none)
    loss.backward()
    assert float(loss) == 0 and not feature.grad.any()


def test_presence_loss_by_hand():
    torch.manual_seed(0)
    network, feature = PresenceNetwork(5, 3).eval(), torch.randn(2, 5, 4, 6)
    presence = torch.tensor([[1., 0., 1.], [0., 0., 1.]])
    pooled = feature.div(math.sqrt(1 + 1e-5)).clamp(min=0).mean((2, 3))
    shares = (pooled @ network.classifier.weight.t() + network.classifier.bias).sigmoid()
    expected = -(presence * shares.log() + (1 - presence) * (1 - shares).log()).mean()
    assert torch.allclose(network.loss(feature, presence), expected)


def test_presence_of_classes():
    model, _ = tiny_detector()
    boxes = torch.cat((BOXES, torch.tensor([[1, 2, 1, 1, 9, 9.]])))
    presence = DCP().find_targets(model, make_batches(1, boxes=boxes)[0])
    assert presence.tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize('kind', [LCP, DCP])
@pytest.mark.parametrize('samples', [mmyolo_samples, mmdet_samples])
def test_training(kind, samples):
    """The networks learn; with joint_lr the detector learns, too, but only its weights change."""
    model, units = tiny_detector()
    model.stem.conv.weight.requires_grad_(False)
    before, batches = state_of(model), make_batches(samples=samples)
    losses, lr = {}, 0.02 if kind is LCP else 1.  # all images of noise look the same
    for epochs in (0, 30):
        criterion = begun(kind(aux_epochs=epochs, aux_lr=lr, joint_lr=0), model,
                          units.values(), batches)
        assert not changed(model, before)
        with torch.no_grad():
            target = criterion.find_targets(model, batches[0])
            feature = model.body.conv(model.stem(batches[0].images))
            network = criterion.auxiliaries['stem.conv'].network
            losses[epochs] = float(network.train().loss(feature, target))
    assert losses[30] < 0.8 * losses[0]
    begun(kind(aux_epochs=2, joint_lr=1e-3), model, units.values(), batches)
    expected = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(changed(model, before)) == expected


def test_one_network_for_each_unit():
    """At the largest consumer; the networks do not become a part of the model."""
    model, units = tiny_detector()
    keys = set(model.state_dict())
    criterion = begun(LCP(aux_epochs=1), model, units.values(), make_batches())
    assert {name: (item.layer, item.call, item.channels)
            for name, item in criterion.auxiliaries.items()} == {
                'stem.conv': ('body.conv', 0, 8), 'body.conv': ('pred', 0, 5)}
    assert set(model.state_dict()) == keys
    parameters = {id(param) for param in model.parameters()}
    networks = [item.network for item in criterion.auxiliaries.values()]
    assert all(id(param) not in parameters and not param.requires_grad
               for network in networks for param in network.parameters())
    assert not any(network.training for network in networks)


def test_same_seed_same_networks():
    states = []
    for seed in (0, 0, 1):
        model, units = tiny_detector()
        torch.manual_seed(len(states))
        chance = torch.get_rng_state()
        criterion = begun(LCP(aux_epochs=1, seed=seed), model, units.values(), make_batches())
        assert torch.equal(torch.get_rng_state(), chance)
        states.append(criterion.state_dict()['auxiliaries']['stem.conv']['weights'])
    first, second, third = states
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first['conv.weight'], third['conv.weight'])


def test_training_that_diverges():
    model, units = tiny_detector()
    with torch.no_grad():
        model.pred.bias[0] = float('inf')
    with pytest.raises(PruningError, match='is not finite: try a lower aux_lr or joint_lr'):
        LCP().begin(model, list(units.values()), make_batches(), silent)
