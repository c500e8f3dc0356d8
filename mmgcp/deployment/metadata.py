# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What whoever runs an exported file has to know, by name; and how an ONNX file holds it."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmgcp.utils.config import nested_dicts
from mmgcp.version import __version__

Metadata = Dict[str, Any]


def describe(model: nn.Module, cfg: Config, meta: dict, shape: Sequence[int],
             outputs: str) -> Metadata:
    """Describe an exported detector.

    Args:
        model (nn.Module): The detector.
        cfg (Config): Its config.
        meta (dict): The ``meta`` of its checkpoint.
        shape (Sequence[int]): Shape (C, H, W) of the images in pixels.
        outputs (str): ``'raw'`` or ``'detections'``.

    Returns:
        dict[str, Any]: ``classes`` (names, or None if nobody knows them), ``input_size`` (width
        and height), ``mean`` and ``std`` of pixel values from 0 to 255, by channel in the
        ``color_order`` ``'RGB'`` or ``'BGR'``, ``strides``, ``outputs``, ``detector``, ``head`` and
        ``mmgcp_version``.
    """
    preprocessor, head = model.data_preprocessor, model.bbox_head
    mean, std = [0.] * shape[0], [1.] * shape[0]
    if getattr(preprocessor, '_enable_normalize', False):
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    converted = getattr(preprocessor, '_channel_conversion', False)  # images are read as BGR
    return dict(
        classes=class_names(cfg, meta, head.num_classes), input_size=[shape[2], shape[1]],
        mean=mean, std=std, color_order='RGB' if converted else 'BGR',
        strides=_strides(head), outputs=outputs, detector=type(model).__name__,
        head=type(head).__name__, mmgcp_version=__version__)


def class_names(cfg: Config, meta: dict, number: int) -> Optional[List[str]]:
    """Find the names of classes in a checkpoint, a config or its data set, as many as there are."""
    places = [{str(key).lower(): value for key, value in (meta.get('dataset_meta') or {}).items()},
              {'classes': meta.get('CLASSES')}]
    for loader in ('test_dataloader', 'val_dataloader', 'train_dataloader'):
        for part in nested_dicts((cfg.get(loader) or {}).get('dataset') or {}):
            places.append(part.get('metainfo') or {})
            if 'pipeline' in part:  # a data set, not a transform
                places.append(_metainfo_of_class(part.get('type'), cfg.get('default_scope')))
    for place in places:
        names = place.get('classes')
        if isinstance(names, (list, tuple)) and len(names) == number:
            return [str(name) for name in names]
    return None


def _metainfo_of_class(kind: Any, scope: Optional[str]) -> dict:
    """What a class of data sets says of itself."""
    if not isinstance(kind, str):
        return {}
    with DATASETS.switch_scope_and_registry(scope or 'mmyolo') as registry:
        return getattr(registry.get(kind), 'METAINFO', None) or {}


def _strides(head: nn.Module) -> List[int]:
    strides = getattr(head, 'featmap_strides', None)
    if strides is None:
        strides = head.prior_generator.strides
    return [int(stride[0] if isinstance(stride, (list, tuple)) else stride) for stride in strides]


def to_text(metadata: Metadata) -> Dict[str, str]:
    """Write values as JSON, but for those that are text already."""
    return {key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()}


def from_text(texts: Dict[str, str]) -> Metadata:
    """Undo :func:`to_text`."""
    def read(text):
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {key: read(text) for key, text in texts.items()}


def set_onnx_metadata(path: Path, metadata: Metadata) -> None:
    """Put metadata into an ONNX file, in place of all that it has."""
    import onnx
    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, to_text(metadata))
    onnx.save(model, str(path))
