# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A picture of the detections of several models."""
from pathlib import Path
from typing import Iterable, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmgcp.compatibility import mend_openmmlab
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import load_config

WIDTH, GAP = 360, 6  # of a column, and between images, in pixels
WHITE, FONT = (255, 255, 255), cv2.FONT_HERSHEY_SIMPLEX
COLORS = [(60, 76, 231), (219, 152, 52), (96, 174, 39), (15, 196, 241), (182, 89, 155),
          (156, 188, 26), (34, 126, 230), (94, 73, 52)]


class Boxes(NamedTuple):
    """Boxes (K, 4) in an image, as (x1, y1, x2, y2) in pixels, with their labels and texts."""
    corners: np.ndarray
    labels: List[int]
    texts: List[str]


def draw_detections(stages: Iterable[Tuple[str, Path, str]], path: Path, num_images: int = 4,
                    score_thr: float = 0.4) -> None:
    """Draw the detections of several models next to the annotations of test images.

    Args:
        stages (Iterable[tuple]): Name, config and checkpoint of each model; the first config
            says which images to draw.
        path (Path): The PNG file to write.
        num_images (int): Number of images, spread evenly over the test set. Defaults to 4.
        score_thr (float): Only detections with a higher score are drawn. Defaults to 0.4.
    """
    mend_openmmlab()  # so that the checkpoints can be loaded
    stages = list(stages)
    samples, classes = _test_samples(load_config(str(stages[0][1])), num_images)
    columns = [('annotations', [_truth(sample, classes) for sample in samples])]
    for name, config, checkpoint in stages:
        model = init_detector(str(config), str(checkpoint), device='cpu')
        with torch.no_grad():
            results = [inference_detector(model, sample['img_path']) for sample in samples]
        columns.append((name, [_confident(result, score_thr, classes) for result in results]))
    rows = [_draw_title([name for name, _ in columns])]
    for row, sample in enumerate(samples):
        image = cv2.imread(sample['img_path'])
        rows.append(np.hstack([_draw(image, boxes[row]) for _, boxes in columns]))
    with replacing(path) as (temporary, ):
        if not cv2.imwrite(str(temporary), np.vstack(rows)):
            raise OSError(f'{path} cannot be written')


def _test_samples(cfg: Config, num_images: int) -> Tuple[List[dict], Sequence[str]]:
    """What the test set has of some images, and the names of its classes."""
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmyolo')):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    indices = np.linspace(0, len(dataset) - 1, num_images).astype(int)
    return ([dataset.get_data_info(int(index)) for index in indices],
            dataset.metainfo.get('classes') or ())


def _truth(sample: dict, classes: Sequence[str]) -> Boxes:
    instances = [item for item in sample['instances'] if not item['ignore_flag']]
    labels = [int(item['bbox_label']) for item in instances]
    return Boxes(np.array([item['bbox'] for item in instances]).reshape(-1, 4), labels,
                 [_name(classes, label) for label in labels])


def _confident(result: DetDataSample, score_thr: float, classes: Sequence[str]) -> Boxes:
    instances = result.pred_instances
    instances = instances[instances.scores > score_thr]
    labels = instances.labels.tolist()
    return Boxes(instances.bboxes.numpy(), labels, [
        f'{_name(classes, label)} {score:.2f}'
        for label, score in zip(labels, instances.scores.tolist())])


def _name(classes: Sequence[str], label: int) -> str:
    return str(classes[label] if label < len(classes) else label)


def _draw(image: np.ndarray, boxes: Boxes) -> np.ndarray:
    """Return the image with its boxes, as wide as a column."""
    scale = WIDTH / image.shape[1]
    small = cv2.resize(image, None, fx=scale, fy=scale,
                       interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    corners = (boxes.corners * scale).round().astype(int).tolist()
    colors = [COLORS[label % len(COLORS)] for label in boxes.labels]
    for box, color in zip(corners, colors):
        cv2.rectangle(small, tuple(box[:2]), tuple(box[2:]), color, 2)
    for box, color, text in zip(corners, colors, boxes.texts):  # over all boxes
        _draw_text(small, box[0], box[1], text, color)
    return cv2.copyMakeBorder(small, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=WHITE)


def _draw_text(image: np.ndarray, left: int, bottom: int, text: str, color: tuple) -> None:
    """Write on a bar of a color above a place, or below it where there is no room."""
    (width, height), _ = cv2.getTextSize(text, FONT, 0.4, 1)
    bottom = bottom if bottom >= height + 5 else bottom + height + 5
    left = max(0, min(left, image.shape[1] - width - 4))
    cv2.rectangle(image, (left, bottom - height - 5), (left + width + 3, bottom), color, -1)
    cv2.putText(image, text, (left + 2, bottom - 3), FONT, 0.4, WHITE, 1, cv2.LINE_AA)


def _draw_title(names: List[str]) -> np.ndarray:
    title = np.full((32, (WIDTH + GAP) * len(names), 3), 255, np.uint8)
    for column, name in enumerate(names):
        cv2.putText(title, name, (column * (WIDTH + GAP) + 4, 22), FONT, 0.6, (40, 40, 40), 1,
                    cv2.LINE_AA)
    return title
