# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A picture of the detections of several models."""
from pathlib import Path
from typing import Iterable, List, Tuple

import cv2
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.registry import DATASETS, DefaultScope

from mmgcp.compatibility import mend_openmmlab
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import load_config

CELL = 320  # pixels
COLORS = [(60, 76, 231), (219, 152, 52), (96, 174, 39), (15, 196, 241), (182, 89, 155),
          (156, 188, 26), (34, 126, 230), (94, 73, 52)]


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
    cfg = load_config(str(stages[0][1]))
    samples = _test_samples(cfg, num_images)
    columns = [('annotations', [_truth(sample) for sample in samples])]
    for name, config, checkpoint in stages:
        model = init_detector(str(config), str(checkpoint), device='cpu')
        with torch.no_grad():
            results = [inference_detector(model, sample['img_path']) for sample in samples]
        columns.append((name, [_confident(result, score_thr) for result in results]))
    grid = [_draw_title([name for name, _ in columns])]
    for row, sample in enumerate(samples):
        image = cv2.imread(sample['img_path'])
        grid.append(np.hstack([_draw(image, *boxes[row]) for _, boxes in columns]))
    with replacing(path) as (temporary, ):
        if not cv2.imwrite(str(temporary), np.vstack(grid)):
            raise OSError(f'{path} cannot be written')


def _test_samples(cfg, num_images: int) -> List[dict]:
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmyolo')):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    indices = np.linspace(0, len(dataset) - 1, num_images).astype(int)
    return [dataset.get_data_info(int(index)) for index in indices]


def _truth(sample: dict) -> Tuple[np.ndarray, np.ndarray]:
    instances = [item for item in sample['instances'] if not item['ignore_flag']]
    boxes = np.array([item['bbox'] for item in instances]).reshape(-1, 4)
    return boxes, np.array([item['bbox_label'] for item in instances], dtype=int)


def _confident(result, score_thr: float) -> Tuple[np.ndarray, np.ndarray]:
    instances = result.pred_instances
    keep = instances.scores > score_thr
    return instances.bboxes[keep].numpy(), instances.labels[keep].numpy()


def _draw(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the image with its boxes, fitted into a square cell."""
    scale = CELL / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for box, label in zip((boxes * scale).round().astype(int).tolist(), labels.tolist()):
        cv2.rectangle(small, tuple(box[:2]), tuple(box[2:]), COLORS[label % len(COLORS)], 2)
    cell = np.full((CELL, CELL, 3), 255, np.uint8)
    cell[:small.shape[0], :small.shape[1]] = small
    return cv2.copyMakeBorder(cell, 0, 6, 0, 6, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _draw_title(names: List[str]) -> np.ndarray:
    title = np.full((32, (CELL + 6) * len(names), 3), 255, np.uint8)
    for column, name in enumerate(names):
        cv2.putText(title, name, (column * (CELL + 6) + 4, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6,
                    (40, 40, 40), 1, cv2.LINE_AA)
    return title
