# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one place where mmgcp changes other packages. Importing mmgcp changes nothing."""
import functools
from typing import Any

from .checkpoints import allow_mmengine_checkpoints
from .weights_only import load_weights_only


@functools.lru_cache(maxsize=None)
def mend_openmmlab() -> None:
    """Mend what does not work in the installed OpenMMLab packages, once in a process.

    * ``torch.load`` reads MMEngine's checkpoints: :func:`allow_mmengine_checkpoints`.
    * Checkpoints, from URLs too, are read without running code: :func:`load_weights_only`.
    * SSD heads predict: :func:`let_ssd_predict`.
    * COCO's metric rates a detector that finds nothing: :func:`let_coco_rate_nothing`.

    It is called where it is first needed: by mmgcp's registries when one of its classes is
    built from a config, when mmgcp reads a checkpoint or builds a detector, and by
    ``tools/train.py``. MMYOLO's own ``tools/test.py`` and ``tools/train.py --resume`` thus work
    with every config that has a hook, data set or model of mmgcp. Scripts that use none, or
    whose configs name classes instead of strings as the ``type``, call it themselves.

    What was changed is logged once.
    """
    from mmengine.logging import MMLogger
    done = []
    if allow_mmengine_checkpoints():
        done.append("torch.load reads MMEngine's checkpoints")
    if load_weights_only():
        done.append("MMEngine's loader runs no code of checkpoints, from URLs too")
    if let_ssd_predict():
        done.append("MMDetection's SSDHead predicts")
    if let_coco_rate_nothing():
        done.append("MMDetection's CocoMetric rates a detector that finds nothing")
    if done:
        MMLogger.get_current_instance().info(
            'mmgcp has mended other packages in this process, and nothing is left to do: '
            f'{"; ".join(done)}.')


def let_ssd_predict() -> bool:
    """Let SSD heads predict with MMDetection 3.2 and 3.3.

    These versions look at the ``loss_cls`` of every dense head during prediction, but SSDHead
    has none (https://github.com/open-mmlab/mmdetection/issues/11780).

    Returns:
        bool: Whether SSDHead was changed.
    """
    from mmdet.models.dense_heads import SSDHead
    if hasattr(SSDHead, 'loss_cls'):
        return False
    SSDHead.loss_cls = None
    return True


def let_coco_rate_nothing() -> bool:
    """Let COCO's metric rate a detector that finds nothing at all.

    MMDetection logs an error instead and returns no metrics, so that whoever asks for one fails
    (https://github.com/open-mmlab/mmdetection/issues/8907). The metrics are now those of a single
    empty box, which matches no object: 0, or -1 where COCO's are -1 as there are no objects.

    Returns:
        bool: Whether CocoMetric was changed; its subclasses that compute their metrics themselves
        are left alone.
    """
    from mmdet.evaluation import CocoMetric
    original = CocoMetric.compute_metrics
    if hasattr(original, '__wrapped__'):
        return False

    @functools.wraps(original)
    def compute_metrics(self: Any, results: list) -> dict:
        values = original(self, results)
        if self.format_only or any(len(found['scores']) for _, found in results):
            return values
        prefix, self.outfile_prefix = self.outfile_prefix, None  # the box goes into no file
        try:
            return original(self, _with_empty_box(results))
        finally:
            self.outfile_prefix = prefix

    CocoMetric.compute_metrics = compute_metrics
    return True


def _with_empty_box(results: list) -> list:
    """Add a box without an area to what CocoMetric has collected of the first image."""
    import numpy as np
    from mmdet.structures.mask import encode_mask_results
    (truth, found), *others = results
    found = dict(found, bboxes=np.zeros((1, 4)), scores=np.zeros(1), labels=np.zeros(1, int))
    if 'masks' in found:
        mask = np.zeros((truth['height'], truth['width']), np.uint8)
        found.update(masks=encode_mask_results([mask]), mask_scores=np.zeros(1))
    return [(truth, found), *others]
