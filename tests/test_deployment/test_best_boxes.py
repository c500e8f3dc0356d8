# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Decoding and NMS against MMYOLO's own, on random outputs of a head."""
import copy
from inspect import signature

import onnxruntime
import pytest
import torch
from mmcv.ops import batched_nms
from mmengine.config import ConfigDict
from yolov4_samples import build, yolov4

from mmgcp.deployment.candidates import BestBoxes, check_nms, decode
from mmgcp.errors import UserError

BASE = dict(multi_label=True, nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6),
            max_per_img=20)
SIZE = (96, 64)


@pytest.fixture(scope='module')
def heads(modules):
    return {number: build(yolov4(num_classes=number)).bbox_head for number in (1, 3)}


def random_outputs(num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def level(channels, stride):
        shape = (2, channels, SIZE[0] // stride, SIZE[1] // stride)
        return 1.5 * torch.randn(*shape, generator=generator)

    return tuple([level(3 * width, stride) for stride in (8, 16, 32)]
                 for width in (num_classes, 4, 1))


@pytest.mark.parametrize('settings', [
    {}, dict(multi_label=False), dict(nms_pre=7), dict(nms_pre=100000), dict(score_thr=0.4),
    dict(score_thr=-1), dict(score_thr=0.99), dict(min_bbox_size=30), dict(max_per_img=3),
    dict(nms=dict(type='nms', iou_threshold=0.6, class_agnostic=True)),
    dict(nms=dict(iou_threshold=0.3)), dict(yolox_style=True)],
    ids=lambda settings: '-'.join(settings) or 'base')
@pytest.mark.parametrize('num_classes', [1, 3])
@pytest.mark.parametrize('fixed_size', [True, False])
def test_as_the_head_predicts(heads, settings, num_classes, fixed_size):
    head, test_cfg = heads[num_classes], {**BASE, **settings}
    outputs = random_outputs(num_classes)
    meta = dict(ori_shape=(10**4, 10**4), scale_factor=(1., 1.))
    expected = head.predict_by_feat(
        *outputs, batch_img_metas=[meta] * 2, cfg=ConfigDict(copy.deepcopy(test_cfg)))
    best = BestBoxes(test_cfg, num_classes, fixed_size)
    for item, boxes, scores, labels in zip(expected, *best(*decode(head, outputs, fixed_size))):
        number = min(len(item.scores), test_cfg['max_per_img'])
        assert number > 0 or test_cfg['score_thr'] == 0.99
        assert int((labels >= 0).sum()) == number
        torch.testing.assert_close(scores[:number], item.scores[:number])
        torch.testing.assert_close(boxes[:number].clamp(min=0), item.bboxes[:number],
                                   rtol=0, atol=1e-3)
        assert torch.equal(labels[:number], item.labels[:number])
        assert (labels[number:] == -1).all() and (boxes[number:] == 0).all()


@pytest.mark.parametrize('corners', [(2, 1, 0, 3), (0, 3, 2, 1), (2, 3, 0, 1)])
def test_boxes_with_sides_that_are_swapped(corners, tmp_path):
    """As of a head whose distances are negative: they overlap nothing, for ONNX's NMS, too."""
    boxes = torch.tensor([[10., 10., 50., 50.], [11., 10., 50., 50.], [12., 10., 50., 50.],
                          [60., 10., 90., 50.]])
    boxes[1] = boxes[1][list(corners)]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    expected = batched_nms(boxes, scores, torch.zeros(4), BASE['nms'])[1]
    assert expected.tolist() == [0, 1, 3]
    best, path = BestBoxes(BASE, 1, True), tmp_path / 'best.onnx'
    inputs = (boxes[None], scores[None, :, None], torch.ones(1, 4))
    settings = {'dynamo': False} if 'dynamo' in signature(torch.onnx.export).parameters else {}
    torch.onnx.export(best, inputs, str(path), opset_version=13, input_names=['a', 'b', 'c'],
                      **settings)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    found = session.run(None, {name: value.numpy() for name, value in zip('abc', inputs)})
    for file_boxes, file_scores in (found[:2], best(*inputs)[:2]):
        assert (torch.as_tensor(file_boxes)[0, :3] == boxes[expected]).all()
        assert torch.as_tensor(file_scores)[0].tolist() == [*scores[expected].tolist(), 0]


@pytest.mark.parametrize('nms', [
    None, dict(type='soft_nms', iou_threshold=0.5), dict(type='nms', iou_threshold=0.5, max_num=9),
    dict(type='nms')])
def test_unknown_nms(nms):
    with pytest.raises(UserError, match='only test_cfg.nms=.* can be in the file, but it is'):
        check_nms(dict(BASE, nms=nms))
