# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The accuracy of a detector on training batches, without a validation set."""
import contextlib
import io
from typing import Dict, Iterable, List

import torch
import torch.nn as nn
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mmgcp.nn.distributed import gather_over_ranks, numbered
from mmgcp.nn.temporarily import eval_mode
from mmgcp.nn.training_loss import Batch


@torch.no_grad()
def average_precision(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Measure COCO's average precision of a detector on batches as it sees them in training.

    That is the mean over IoU thresholds from 0.5 to 0.95 and the classes that occur. Several
    processes bring batches of their own; all get the value for all images.

    Args:
        model (nn.Module): A detector of MMDetection or MMYOLO. The modes of its modules are
            restored.
        batches (Iterable[Batch]): Preprocessed images with their ground truth.

    Returns:
        float: The average precision in [0, 1]; 0 if there are no objects.
    """
    images, objects, found = [], [], []
    with eval_mode(model):
        for number, batch in numbered(batches):
            truths = _truths(batch)
            predictions = model.predict(batch.images, _samples(batch.images), rescale=False)
            for index, (truth, sample) in enumerate(zip(truths, predictions)):
                image = f'{number}-{index}'
                images.append(dict(id=image))
                objects += _rows(image, *truth)
                instances = sample.pred_instances
                found += _rows(image, get_box_tensor(instances.bboxes), instances.labels,
                               instances.scores)
    images, objects, found = ([row for part in gather_over_ranks(rows) for row in part]
                              for rows in (images, objects, found))
    return _evaluate(images, objects, found)


def _samples(images: Tensor) -> List[DetDataSample]:
    """Make samples without annotations for images (N, C, H, W)."""
    shape = tuple(images.shape[2:])
    return [DetDataSample(metainfo=dict(
        img_id=index, img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
        scale_factor=(1., 1.))) for index in range(len(images))]


def _truths(batch: Batch) -> List[tuple]:
    """Return the boxes (K, 4) and labels (K, ) of the objects in each image of a batch."""
    samples = batch.data_samples
    if isinstance(samples, dict):  # all boxes of a batch, as MMYOLO's fast collating has them
        rows = samples['bboxes_labels']
        return [(rows[rows[:, 0] == index, 2:], rows[rows[:, 0] == index, 1])
                for index in range(len(batch.images))]
    return [(get_box_tensor(sample.gt_instances.bboxes), sample.gt_instances.labels)
            for sample in samples]


def _rows(image: str, boxes: Tensor, labels: Tensor, scores: Tensor = None) -> List[Dict]:
    """Turn boxes (K, 4) of an image to rows of COCO's format."""
    boxes = boxes.double().cpu()
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    rows = [dict(image_id=image, category_id=label, bbox=corner + size, area=size[0] * size[1],
                 iscrowd=0)
            for corner, size, label in zip(boxes[:, :2].tolist(), sizes.tolist(),
                                           labels.long().tolist())]
    for row, score in zip(rows, [] if scores is None else scores.tolist()):
        row['score'] = score
    return rows


def _evaluate(images: List[Dict], objects: List[Dict], found: List[Dict]) -> float:
    """Return the average precision of detections, of the classes that objects have."""
    categories = {row['category_id'] for row in objects}
    found = [row for row in found if row['category_id'] in categories]
    if not found:
        return 0.
    for number, row in enumerate(objects, 1):
        row['id'] = number
    truth = COCO()
    truth.dataset = dict(images=images, annotations=objects,
                         categories=[dict(id=category) for category in sorted(categories)])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), 'bbox')
        # Of the ranges of areas and the numbers of detections only those of AP
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision']
    return float(precision[precision >= 0].mean())
