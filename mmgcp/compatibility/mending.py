# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one place where mmgcp changes other packages. Importing mmgcp changes nothing."""
import functools

from .checkpoints import allow_mmengine_checkpoints


@functools.lru_cache(maxsize=None)
def mend_openmmlab() -> None:
    """Mend what does not work in the installed OpenMMLab packages, once in a process.

    * ``torch.load`` reads MMEngine's checkpoints: :func:`allow_mmengine_checkpoints`.
    * SSD heads predict: :func:`let_ssd_predict`.

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
    if let_ssd_predict():
        done.append("MMDetection's SSDHead predicts")
    if done:
        MMLogger.get_current_instance().info(
            f'mmgcp has mended other packages in this process: {"; ".join(done)}.')


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
