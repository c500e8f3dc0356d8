# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
from meta_device import on_meta
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmgcp.models import YOLOv4Head, YOLOv4HeadModule

ANCHORS = [[(12, 16), (19, 36), (40, 28)], [(36, 75), (76, 55), (72, 146)],
           [(142, 110), (192, 243), (459, 401)]]
STRIDES = [8, 16, 32]
SCALES = [1.2, 1.1, 1.05]
SIZE = 96  # pixels
LEVEL_WEIGHTS = [4.0, 1.0, 0.4]


def make_head(num_classes=3, **kwargs):
    head = YOLOv4Head(
        dict(type='mmgcp.YOLOv4HeadModule', num_classes=num_classes, in_channels=[128, 256, 512],
             widen_factor=0.125), **kwargs)
    head.init_weights()
    return head


def make_predictions(num_images=2, num_classes=3, spread=0.3, seed=0):
    """Raw predictions; with a small spread the boxes are much like the anchors."""
    generator = torch.Generator().manual_seed(seed)

    def randn(channels, stride, factor):
        shape = (num_images, channels, SIZE // stride, SIZE // stride)
        return torch.randn(shape, generator=generator) * factor

    return ([randn(3 * num_classes, stride, 2.) for stride in STRIDES],
            [randn(3 * 4, stride, spread) for stride in STRIDES],
            [randn(3, stride, 2.) for stride in STRIDES])


def make_targets(num_images=2, num_classes=3, images=None, number=4, seed=0):
    """Boxes with the shapes of anchors, more or less, with centres in cells of their own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for level in ANCHORS for shape in level]
    rows = []
    for image in range(num_images) if images is None else images:
        cells = torch.randperm(9, generator=generator)[:number].tolist()
        for index, cell in enumerate(cells):
            random = torch.rand(5, generator=generator)
            shape = shapes[(index + 3 * image + seed) % 7]
            width, height = (shape[axis] * (0.8 + 0.4 * float(random[axis])) for axis in (0, 1))
            x = 32 * (cell % 3) + 1 + 30 * float(random[2])
            y = 32 * (cell // 3) + 1 + 30 * float(random[3])
            rows.append([image, int(random[4] * num_classes), x - width / 2, y - height / 2,
                         x + width / 2, y + height / 2])
    return torch.tensor(rows).reshape(-1, 6)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def cross_entropy(value, target):
    return -target * math.log(sigmoid(value)) - (1 - target) * math.log(1 - sigmoid(value))


def overlap(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return inside / (sum(areas) - inside)


def complete_iou(first, second):
    """Equation 10 and 11 of arXiv 1911.08287."""
    iou = overlap(first, second)
    distance = sum((first[axis] + first[axis + 2] - second[axis] - second[axis + 2])**2 / 4
                   for axis in (0, 1))
    diagonal = sum((max(first[axis + 2], second[axis + 2]) - min(first[axis], second[axis]))**2
                   for axis in (0, 1))
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (first, second)]
    v = 4 / math.pi**2 * (angles[0] - angles[1])**2
    alpha = v / (1 - iou + v) if v else 0
    return iou - distance / diagonal - alpha * v


class Reference:
    """The loss as the docstring of YOLOv4Head tells it, one cell after the other."""

    def __init__(self, num_classes=3, smooth=True, ignore=0.7, match=0.213, scales=SCALES):
        self.scales = scales
        self.num_classes = num_classes
        self.smooth = smooth
        self.ignore = ignore
        self.match = match
        self.ignored = []  # (level, image, anchor, row, column)
        self.positives = set()

    def box(self, pred, level, image, anchor, row, column):
        raw = [float(pred[image, 4 * anchor + index, row, column]) for index in range(4)]
        stride, scale = STRIDES[level], self.scales[level]
        x = stride * (column + scale * sigmoid(raw[0]) - (scale - 1) / 2)
        y = stride * (row + scale * sigmoid(raw[1]) - (scale - 1) / 2)
        width = ANCHORS[level][anchor][0] * math.exp(raw[2])
        height = ANCHORS[level][anchor][1] * math.exp(raw[3])
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]

    def matches(self, target):
        """Levels and anchors that are positive for a box."""
        size = [target[4] - target[2], target[5] - target[3]]
        overlaps = {
            (level, anchor): overlap([0, 0, *size], [0, 0, *ANCHORS[level][anchor]])
            for level in range(3) for anchor in range(3)
        }
        best = max(overlaps, key=overlaps.get)
        return [key for key, value in overlaps.items() if value > self.match or key == best]

    def cells(self, target, level):
        """Rows and columns of the cells that can reach the centre: its own and those beside."""
        stride, number = STRIDES[level], SIZE // STRIDES[level]
        x, y = ((target[axis] + target[axis + 2]) / 2 / stride for axis in (2, 3))
        column, row = (min(max(math.floor(value), 0), number - 1) for value in (x, y))
        found = [(row, column)]
        for place in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
            reached = all(abs(value - index - 0.5) < self.scales[level] / 2
                          for value, index in zip((y, x), place))
            if reached and 0 <= min(place) and max(place) < number:
                found.append(place)
        return found

    def __call__(self, cls_scores, bbox_preds, objectnesses, targets):
        targets = targets.tolist()
        num_images = len(cls_scores[0])
        losses = dict(loss_cls=0., loss_obj=0., loss_bbox=0.)
        for level, stride in enumerate(STRIDES):
            cells = SIZE // stride
            class_losses, box_losses, object_targets = [], [], {}
            for target in targets:
                image, label = int(target[0]), int(target[1])
                anchors = [anchor for found, anchor in self.matches(target) if found == level]
                for anchor, cell in itertools.product(anchors, self.cells(target, level)):
                    place = (image, anchor, *cell)
                    iou = complete_iou(self.box(bbox_preds[level], level, *place), target[2:])
                    box_losses.append(1 - iou)
                    for index in range(self.num_classes):
                        channel = self.num_classes * anchor + index
                        score = float(cls_scores[level][(image, channel, *cell)])
                        class_losses.append(cross_entropy(score, float(index == label)))
                    object_targets[place] = max(iou, 0) if self.smooth else 1.
                    self.positives.add((level, *place))
            object_loss = 0.
            for image in range(num_images):
                own = [target[2:] for target in targets if int(target[0]) == image]
                for anchor in range(3):
                    for row in range(cells):
                        for column in range(cells):
                            place = (image, anchor, row, column)
                            box = self.box(bbox_preds[level], level, *place)
                            if place not in object_targets and any(
                                    overlap(box, other) > self.ignore for other in own):
                                self.ignored.append((level, *place))
                                continue
                            object_loss += cross_entropy(
                                float(objectnesses[level][place]), object_targets.get(place, 0.))
            object_loss /= num_images * 3 * cells**2
            losses['loss_obj'] += object_loss * LEVEL_WEIGHTS[level] * num_images
            if box_losses:
                losses['loss_bbox'] += 0.05 * sum(box_losses) / len(box_losses) * num_images
                if self.num_classes > 1:
                    losses['loss_cls'] += (
                        0.5 * sum(class_losses) / len(class_losses) * num_images)
        return losses


def assert_same(losses, expected):
    assert set(losses) == {'loss_cls', 'loss_obj', 'loss_bbox'}
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def to_instances(targets, num_images):
    return [
        InstanceData(bboxes=targets[targets[:, 0] == image, 2:],
                     labels=targets[targets[:, 0] == image, 1].long())
        for image in range(num_images)
    ]


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('smooth', [True, False])
def test_loss_against_reference(seed, smooth):
    predictions, targets = make_predictions(seed=seed), make_targets(seed=seed)
    reference = Reference(smooth=smooth, ignore=0.5)
    expected = reference(*predictions, targets)
    assert reference.ignored and {place[0] for place in reference.positives} == {0, 1, 2}
    head = make_head(objectness_smooth=smooth, ignore_iou_thr=0.5)
    assert_same(head.loss_by_feat(*predictions, targets, [{}, {}]), expected)


@pytest.mark.parametrize('spread', [0.05, 1.5])
def test_near_and_far_predictions(spread):
    predictions, targets = make_predictions(spread=spread, seed=7), make_targets(seed=7)
    losses = make_head().loss_by_feat(*predictions, targets, [{}, {}])
    assert_same(losses, Reference()(*predictions, targets))


def test_single_class():
    predictions = make_predictions(num_classes=1)
    targets = make_targets(num_classes=1)
    losses = make_head(num_classes=1).loss_by_feat(*predictions, targets, [{}, {}])
    assert losses['loss_cls'] == 0
    assert_same(losses, Reference(num_classes=1)(*predictions, targets))


def test_images_without_ground_truth():
    predictions = make_predictions(num_images=4, seed=2)
    targets = make_targets(images=[1, 2], seed=2)
    expected = Reference()(*predictions, targets)
    assert_same(make_head().loss_by_feat(*predictions, targets, [{}] * 4), expected)
    instances = to_instances(targets, 4)
    assert [len(item) for item in instances] == [0, 4, 4, 0]
    assert_same(make_head().loss_by_feat(*predictions, instances, [{}] * 4), expected)


def test_no_ground_truth_at_all():
    predictions, targets = make_predictions(), torch.zeros(0, 6)
    expected = Reference()(*predictions, targets)
    assert expected['loss_obj'] > 0 and expected['loss_cls'] == expected['loss_bbox'] == 0
    assert_same(make_head().loss_by_feat(*predictions, targets, [{}, {}]), expected)
    instances = to_instances(targets, 2)
    assert_same(make_head().loss_by_feat(*predictions, instances, [{}, {}]), expected)


def test_both_forms_of_ground_truth():
    predictions, targets = make_predictions(seed=3), make_targets(seed=3)
    head = make_head()
    first = head.loss_by_feat(*predictions, targets, [{}, {}])
    second = head.loss_by_feat(*predictions, to_instances(targets, 2), [{}, {}])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_order_of_ground_truth_does_not_matter():
    predictions, targets = make_predictions(seed=4), make_targets(seed=4)
    head = make_head()
    first = head.loss_by_feat(*predictions, targets, [{}, {}])
    second = head.loss_by_feat(*predictions, targets[[5, 0, 7, 3, 1, 2, 6, 4]], [{}, {}])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_ground_truth_at_the_border():
    """Centres on the right and lower border, or beyond, belong to the last cells."""
    predictions = make_predictions(num_images=3, seed=5)
    targets = torch.tensor([[0., 0, 80, 76, 112, 116], [1, 1, -20, -30, 20, 30],
                            [2, 2, 90, -10, 110, 12]])
    reference = Reference()
    expected = reference(*predictions, targets)
    assert {place[3:] for place in reference.positives if place[0] == 0} >= {(11, 11), (0, 11)}
    assert_same(make_head().loss_by_feat(*predictions, targets, [{}] * 3), expected)


def test_two_ground_truths_in_one_place():
    predictions = make_predictions(seed=6)
    targets = torch.tensor([[0., 0, 30, 30, 49, 66], [0, 2, 30, 30, 49, 66]])
    losses = make_head().loss_by_feat(*predictions, targets, [{}, {}])
    assert_same(losses, Reference()(*predictions, targets))


@pytest.mark.parametrize('match', [0.05, 0.213, 0.6, 0.999])
def test_match_threshold(match):
    """With an unreachable threshold only the best anchor remains."""
    predictions, targets = make_predictions(seed=8), make_targets(seed=8)
    reference = Reference(match=match)
    expected = reference(*predictions, targets)
    number = sum(len(reference.matches(target)) for target in targets.tolist())
    assert (number == len(targets)) == (match > 0.5)
    head = make_head(match_iou_thr=match)
    assert_same(head.loss_by_feat(*predictions, targets, [{}, {}]), expected)


@pytest.mark.parametrize('scales', [[2., 2., 2.], [1.6, 1.9, 1.3]])
@pytest.mark.parametrize('seed', range(3))
def test_cells_beside_the_own_one(scales, seed):
    """With a large scale_x_y they can reach the centre, too."""
    predictions = make_predictions(num_images=3, seed=seed)
    targets = make_targets(num_images=3, seed=seed, number=9)
    targets = targets[[0, 9, 18]]
    reference = Reference(scales=scales)
    expected = reference(*predictions, targets)
    number = sum(len(reference.matches(target)) for target in targets.tolist())
    assert len(reference.positives) > 1.5 * number
    head = make_head(bbox_coder=dict(type='mmgcp.YOLOv4BBoxCoder', scale_x_y=scales))
    assert_same(head.loss_by_feat(*predictions, targets, [{}] * 3), expected)


def test_three_cells_of_one():
    """At 2 always the two nearest cells beside, except at the border of the map."""
    predictions = make_predictions(num_images=3)
    targets = torch.tensor([[0., 0, 34, 34, 44, 48], [1, 1, -5, -6, 7, 10],
                            [2, 0, 88, 88, 100, 104]])
    reference = Reference(scales=[2., 2., 2.])
    expected = reference(*predictions, targets)
    places = {place[1:2] + place[3:] for place in reference.positives if place[0] == 0}
    # centres in cells: (4.875, 5.125), (0.125, 0.25) and, beyond the last, (11.75, 12)
    assert places == {(0, 5, 4), (0, 4, 4), (0, 5, 5), (1, 0, 0), (2, 11, 11)}
    head = make_head(bbox_coder=dict(type='mmgcp.YOLOv4BBoxCoder', scale_x_y=[2., 2., 2.]))
    assert_same(head.loss_by_feat(*predictions, targets, [{}] * 3), expected)


def test_best_anchor_of_an_odd_shape():
    """A shape unlike all anchors still has one positive."""
    predictions, targets = make_predictions(), torch.tensor([[0., 1, 40, 40, 42, 42]])
    reference = Reference()
    expected = reference(*predictions, targets)
    assert reference.positives == {(0, 0, 0, 5, 5)}
    assert_same(make_head().loss_by_feat(*predictions, targets, [{}, {}]), expected)


def test_ignored_negatives_do_not_count():
    """Neither value nor gradient of their objectness matters; those of others do."""
    cls_scores, bbox_preds, objectnesses = make_predictions(seed=1)
    targets = make_targets(seed=1)
    reference = Reference(ignore=0.5)
    reference(cls_scores, bbox_preds, objectnesses, targets)
    assert len(reference.ignored) > 2
    for objectness in objectnesses:
        objectness.requires_grad_()
    head = make_head(ignore_iou_thr=0.5)
    before = head.loss_by_feat(cls_scores, bbox_preds, objectnesses, targets, [{}, {}])
    before['loss_obj'].backward()
    zero = {(level, *place) for level, objectness in enumerate(objectnesses)
            for place in (objectness.grad == 0).nonzero().tolist()}
    assert zero == set(reference.ignored)

    changed = [objectness.detach().clone() for objectness in objectnesses]
    for level, *place in reference.ignored:
        changed[level][tuple(place)] += 5
    after = head.loss_by_feat(cls_scores, bbox_preds, changed, targets, [{}, {}])
    torch.testing.assert_close(after['loss_obj'], before['loss_obj'].detach())


@pytest.mark.parametrize('ignore', [0.4, 0.95])
def test_ignore_threshold(ignore):
    predictions, targets = make_predictions(seed=9), make_targets(seed=9)
    expected = Reference(ignore=ignore)(*predictions, targets)
    head = make_head(ignore_iou_thr=ignore)
    assert_same(head.loss_by_feat(*predictions, targets, [{}, {}]), expected)


def test_boxes_of_other_images_are_not_ignored():
    """A negative is compared with the ground truths of its own image only."""
    predictions = [[level.new_zeros(level.shape) for level in kind] for kind in make_predictions()]
    targets = torch.tensor([[1., 0, 38, 36, 50, 52]])
    reference = Reference(ignore=0.2)
    expected = reference(*predictions, targets)
    assert reference.ignored and {place[1] for place in reference.ignored} == {1}
    head = make_head(ignore_iou_thr=0.2)
    assert_same(head.loss_by_feat(*predictions, targets, [{}, {}]), expected)


def test_inputs_are_not_changed():
    predictions, targets = make_predictions(), make_targets()
    before = copy.deepcopy((predictions, targets))
    head = make_head()
    first = head.loss_by_feat(*predictions, targets, [{}, {}])
    second = head.loss_by_feat(*predictions, targets, [{}, {}])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(targets, before[1])
    for kind, kind_before in zip(predictions, before[0]):
        assert all(torch.equal(*pair) for pair in zip(kind, kind_before))


def test_loss_weights():
    predictions, targets = make_predictions(), make_targets()
    usual = make_head().loss_by_feat(*predictions, targets, [{}, {}])
    entropy = dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, reduction='mean')
    head = make_head(
        loss_cls=dict(entropy, loss_weight=1.5), loss_obj=dict(entropy, loss_weight=0.25),
        loss_bbox=dict(type='IoULoss', iou_mode='ciou', bbox_format='xyxy', loss_weight=0.5))
    losses = head.loss_by_feat(*predictions, targets, [{}, {}])
    for name, factor in (('loss_cls', 3), ('loss_obj', 0.25), ('loss_bbox', 10)):
        torch.testing.assert_close(losses[name], usual[name] * factor)


@pytest.mark.parametrize('number', [4, 0])
def test_gradients(number):
    """They reach each parameter, also without ground truth (for distributed training)."""
    head = make_head().train()
    features = tuple(torch.randn(2, channels, SIZE // stride, SIZE // stride)
                     for channels, stride in zip((16, 32, 64), STRIDES))
    targets = make_targets(number=number)
    losses = head.loss(features, dict(bboxes_labels=targets, img_metas=[{}, {}]))
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    weight = head.head_module.convs_pred[0].weight.grad.reshape(3, 8, 32).abs().sum((0, 2))
    # box, objectness and class predictions
    assert bool((weight[:4] > 0).all()) == bool((weight[5:] > 0).all()) == bool(number)
    assert weight[4] > 0


def test_smooth_targets_have_no_gradient():
    """The objectness loss does not pull the boxes."""
    predictions, targets = make_predictions(), make_targets()
    for pred in predictions[1]:
        pred.requires_grad_()
    losses = make_head().loss_by_feat(*predictions, targets, [{}, {}])
    assert not losses['loss_obj'].requires_grad


def plant(level=1, anchor=1, row=3, column=4, label=2, score=6., raw=(0.3, -0.4, 0.2, -0.1),
          predictions=None):
    """Raw predictions of nothing but one box, and that box by hand."""
    if predictions is None:
        predictions = [[torch.full(pred.shape, -12.) for pred in kind]
                       for kind in make_predictions(num_images=1)]
        predictions[1] = [torch.zeros_like(pred) for pred in predictions[1]]
    cls_scores, bbox_preds, objectnesses = predictions
    cls_scores[level][0, 3 * anchor + label, row, column] = score
    objectnesses[level][0, anchor, row, column] = score
    bbox_preds[level][0, 4 * anchor:4 * anchor + 4, row, column] = torch.tensor(raw)
    box = Reference().box(bbox_preds[level], level, 0, anchor, row, column)
    return predictions, box


TEST_CFG = ConfigDict(multi_label=True, nms_pre=100, score_thr=0.01, max_per_img=10,
                      nms=dict(type='nms', iou_threshold=0.6))


@pytest.mark.parametrize('place', [
    dict(level=0, anchor=0, row=5, column=7), dict(level=0, anchor=2, row=4, column=6, label=0),
    dict(level=1, anchor=0, row=2, column=3, label=1), dict(level=1, anchor=1, row=3, column=2),
    dict(level=2, anchor=0, row=1, column=1, raw=(0., 0.5, -0.9, -0.8)),
])
def test_planted_box_is_found(place):
    predictions, box = plant(**place)
    meta = dict(ori_shape=(SIZE, SIZE), scale_factor=(1., 1.))
    (result, ) = make_head().predict_by_feat(
        *predictions, batch_img_metas=[meta], cfg=TEST_CFG, rescale=False)
    assert result.labels.tolist() == [place.get('label', 2)]
    assert float(result.scores) == pytest.approx(sigmoid(6.)**2, rel=1e-5)
    clipped = [min(max(value, 0), SIZE) for value in box]
    assert result.bboxes[0].tolist() == pytest.approx(clipped, abs=1e-3)


def test_boxes_that_overlap_are_suppressed():
    predictions, box = plant(score=4.)
    predictions, weaker = plant(column=3, raw=(1.9, -0.4, 0.2, -0.1), score=3.,
                                predictions=predictions)
    assert overlap(box, weaker) > 0.6
    predictions, other = plant(level=0, anchor=0, row=1, column=1, score=2., label=0,
                               predictions=predictions)
    meta = dict(ori_shape=(SIZE, SIZE), scale_factor=(1., 1.))
    (result, ) = make_head().predict_by_feat(
        *predictions, batch_img_metas=[meta], cfg=TEST_CFG, rescale=False)
    assert result.labels.tolist() == [2, 0]
    expected = [min(max(value, 0), SIZE) for value in other]
    assert result.bboxes[1].tolist() == pytest.approx(expected, abs=1e-3)


def test_boxes_in_the_original_image():
    predictions, box = plant(level=0, anchor=1, row=6, column=6)
    meta = dict(ori_shape=(40, 48), scale_factor=(2., 2.), pad_param=[8., 8., 0., 0.])
    (result, ) = make_head().predict_by_feat(
        *predictions, batch_img_metas=[meta], cfg=TEST_CFG, rescale=True)
    expected = [box[0] / 2, (box[1] - 8) / 2, box[2] / 2, (box[3] - 8) / 2]
    assert 0 < min(expected) and max(expected[0::2]) < 48 and max(expected[1::2]) < 40
    assert result.bboxes[0].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('num_classes, widen', [(80, 1.0), (20, 1.0), (1, 0.5)])
def test_shapes(num_classes, widen):
    with on_meta():
        module = YOLOv4HeadModule(num_classes, [128, 256, 512], widen_factor=widen)
        channels = [int(width * widen) for width in (128, 256, 512)]
        maps = tuple(torch.empty(2, number, SIZE // stride, SIZE // stride)
                     for number, stride in zip(channels, STRIDES))
        cls_scores, bbox_preds, objectnesses = module(maps)
    for level, cells in enumerate((12, 6, 3)):
        assert cls_scores[level].shape == (2, 3 * num_classes, cells, cells)
        assert bbox_preds[level].shape == (2, 12, cells, cells)
        assert objectnesses[level].shape == (2, 3, cells, cells)
        bridge = module.convs_bridge[level]
        assert bridge.conv.weight.shape == (2 * channels[level], channels[level], 3, 3)
        assert isinstance(bridge.activate, nn.LeakyReLU)
        assert bridge.activate.negative_slope == 0.1


def test_overfitting_one_image(tiny_detector):
    detector = tiny_detector(num_classes=2).train()
    image = torch.rand(1, 3, 64, 64)
    targets = torch.tensor([[0., 0, 8, 8, 40, 36], [0, 1, 36, 30, 60, 62]])
    samples = dict(bboxes_labels=targets, img_metas=[{}])
    optimizer = torch.optim.Adam(detector.parameters(), lr=2e-3)
    totals = []
    for _ in range(30):
        losses = detector(image, samples, mode='loss')
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append({name: value.item() for name, value in losses.items()})
    first, last = sum(totals[0].values()), sum(totals[-1].values())
    assert last < 0.5 * first
    assert all(totals[-1][name] < totals[0][name] for name in ('loss_cls', 'loss_bbox'))
