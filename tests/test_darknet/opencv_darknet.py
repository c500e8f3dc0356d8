# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Comparison with OpenCV's own reader of Darknet networks."""
import cv2
import numpy as np
import pytest
import torch
from darknet_samples import SIZE

needs_opencv_4 = pytest.mark.skipif(
    not hasattr(cv2.dnn, 'readNetFromDarknet'),
    reason='this OpenCV does not read Darknet networks; 4.x does')
TOLERANCE = 1e-4


def run_opencv(cfg, weights, image):
    """Raw predictions and the rows of the yolo layers, both by level."""
    net = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    yolos = [name for name in net.getLayerNames() if name.startswith('yolo_')]
    convs = [f'conv_{int(name.split("_")[1]) - 1}' for name in yolos]
    net.setInput(image)
    outputs = net.forward(convs + yolos)
    return outputs[:3], [rows.reshape(-1, rows.shape[-1]) for rows in outputs[3:]]


def raw_predictions(outputs):
    """(N, A, 5 + classes, H, W) in Darknet's order of channels, for each level."""
    raw = []
    for cls_score, bbox_pred, objectness in zip(*outputs):
        n, num_anchors, height, width = objectness.shape
        raw.append(torch.cat([
            tensor.view(n, num_anchors, -1, height, width)
            for tensor in (bbox_pred, objectness, cls_score)
        ], dim=2))
    return raw


def decoded_rows(head, raw):
    """Rows (cx, cy, w, h, objectness, class scores) of a level, relative to the input."""
    sizes = [tensor.shape[-2:] for tensor in raw]
    priors = head.prior_generator.grid_priors(sizes, device='cpu')
    rows = []
    for tensor, level_priors, stride in zip(raw, priors, head.featmap_strides):
        flat = tensor[0].permute(2, 3, 0, 1).reshape(-1, 5 + head.num_classes)
        boxes = head.bbox_coder.decode(level_priors, flat[:, :4], stride)
        scale = boxes.new_tensor(SIZE)
        center = (boxes[:, :2] + boxes[:, 2:]) / 2 / scale
        objectness = flat[:, 4:5].sigmoid()
        rows.append(torch.cat((center, (boxes[:, 2:] - boxes[:, :2]) / scale, objectness,
                               flat[:, 5:].sigmoid() * objectness), dim=1))
    return rows


def assert_agrees(model, cfg, weights):
    image = np.random.RandomState(0).rand(1, 3, SIZE[1], SIZE[0]).astype(np.float32)
    with torch.no_grad():
        raw = raw_predictions(model(torch.from_numpy(image), mode='tensor'))
        rows = decoded_rows(model.bbox_head, raw)
    cv_raw, cv_rows = run_opencv(cfg, weights, image)
    for ours, theirs in zip(raw, cv_raw):
        assert 0.1 < ours.abs().mean() < 10  # or the comparison would not mean much
        np.testing.assert_allclose(ours.flatten(1, 2).numpy(), theirs, atol=TOLERANCE, rtol=0)
    for ours, theirs in zip(rows, cv_rows):
        ours = ours.numpy()
        np.testing.assert_allclose(ours[:, :5], theirs[:, :5], atol=TOLERANCE, rtol=TOLERANCE)
        # OpenCV sets the scores below its threshold of 0.2 to zero.
        kept = theirs[:, 5:] > 0
        assert kept.any()
        np.testing.assert_allclose(ours[:, 5:][kept], theirs[:, 5:][kept], atol=TOLERANCE)
        assert (ours[:, 5:][~kept] < 0.2 + TOLERANCE).all()
