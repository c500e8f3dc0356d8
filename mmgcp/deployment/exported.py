# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Networks in files that other programs than PyTorch run."""
import importlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor

from mmgcp.datasets.calibration import evaluate
from mmgcp.errors import UserError, told

from .metadata import Metadata
from .predictions import DETECTIONS, nested

FORMATS: Dict[str, Type['ExportedModel']] = {}  # by the suffix of files


class ExportedModel:
    """A network in a file; its subclasses know how to run one kind of file.

    Args:
        path (str | Path): The file.
        threads (int): Number of threads it runs on. Defaults to 1.

    Attributes:
        metadata (dict): See :func:`mmgcp.deployment.metadata.describe`.
        output_names (list[str]): Names of the outputs, in their order.
        input_shape (tuple[int | None]): Shape (N, C, H, W) of the images, None for what is free.
    """
    suffix, package = '', ''
    metadata: Metadata
    output_names: List[str]
    input_shape: Tuple[Optional[int], ...]

    def __init__(self, path: Union[str, Path], threads: int = 1):
        self.path, self.threads = Path(path), threads

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a kind of file."""
        super().__init_subclass__(**kwargs)
        FORMATS[cls.suffix] = cls

    def run_batch(self, images: Tensor) -> List[Tensor]:
        """Run it on images (N, C, H, W) of the shape that it takes; return its outputs."""
        raise NotImplementedError

    def run(self, images: Tensor) -> Dict[str, Tensor]:
        """Run it on any number of images.

        Args:
            images (Tensor): (N, C, H, W), normalised, on the CPU.

        Returns:
            dict[str, Tensor]: Its outputs by name.

        Raises:
            UserError: It takes images of another size.
        """
        fixed = [(side, wanted) for side, wanted in zip(images.shape[1:], self.input_shape[1:])]
        if any(wanted not in (None, side) for side, wanted in fixed):
            raise UserError(f'{self.path} takes images of {_shape_text(self.input_shape[1:])}, but '
                            f'these have {_shape_text(images.shape[1:])}')
        images, number = images.float().contiguous(), self.input_shape[0]
        parts = [images] if number is None else _parts(images, number)
        outputs = [self.run_batch(part) for part in parts]
        return {name: torch.cat(tensors)[:len(images)]
                for name, tensors in zip(self.output_names, zip(*outputs))}


def _shape_text(shape) -> str:
    channels, *size = ('any' if side is None else str(side) for side in shape)
    return f'{channels} channels and {" x ".join(size)} pixels (height x width)'


def _parts(images: Tensor, number: int) -> List[Tensor]:
    """Batches of just so many images; the last one repeats its last image."""
    missing = -len(images) % number
    images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    return list(images.split(number))


def open_exported(path: Union[str, Path], threads: int = 1) -> ExportedModel:
    """Open an exported file, by its suffix.

    Args:
        path (str | Path): The file, as ``tools/export.py`` writes it.
        threads (int): Number of threads it runs on. Defaults to 1.

    Returns:
        ExportedModel: The network in it.

    Raises:
        UserError: There is no such file, nothing to run it with, or it cannot be read.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f'{path} is none of {", ".join(sorted(FORMATS))}')
    if not path.is_file():
        raise UserError(f'there is no {path}')
    kind = FORMATS[path.suffix]
    require(kind.package, 'to run such files')
    try:
        return kind(path, threads)
    except (UserError, OSError):
        raise
    except Exception as error:  # each program has its own
        raise UserError(f'{kind.package} cannot read {path}: {told(error)}') from error


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def require(package: str, purpose: str) -> None:
    """Raise a UserError if a package cannot be imported, which says what it is needed for."""
    if not is_installed(package):
        raise UserError(f'{package} is needed {purpose}: pip install {package}')


class ExportedDetector(nn.Module):
    """A detector whose network is a file; what comes before and after it is PyTorch's.

    :func:`mmgcp.datasets.calibration.evaluate` takes it for a detector.

    Args:
        detector (nn.Module): The detector that the file was made of.
        exported (ExportedModel): The file.
    """

    def __init__(self, detector: nn.Module, exported: ExportedModel):
        super().__init__()
        self.detector = detector
        self.exported = exported

    @torch.no_grad()
    def val_step(self, data: dict) -> list:
        """Predict on a batch of a data loader, as detectors of MMDetection do."""
        data = self.detector.data_preprocessor(data, False)
        samples = data['data_samples']
        metas = [sample.metainfo for sample in samples]
        outputs = self.exported.run(data['inputs'])
        if set(outputs) == set(DETECTIONS):
            results = [_in_original_image(*item, meta) for *item, meta in zip(
                *(outputs[name] for name in DETECTIONS), metas)]
        else:
            results = self.detector.bbox_head.predict_by_feat(
                *nested(outputs), batch_img_metas=metas, rescale=True)
        return self.detector.add_pred_to_datasample(samples, results)


def _in_original_image(boxes: Tensor, scores: Tensor, labels: Tensor, meta: dict) -> InstanceData:
    """What was found in an image, in pixels of the original one."""
    found = labels >= 0
    top, _, left, _ = meta.get('pad_param', (0, 0, 0, 0))
    factor = boxes.new_tensor(meta['scale_factor']).repeat(2)
    boxes = (boxes[found] - boxes.new_tensor([left, top, left, top])) / factor
    height, width = meta['ori_shape'][:2]
    boxes = torch.min(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    return InstanceData(bboxes=boxes, scores=scores[found], labels=labels[found])


def evaluate_exported(exported: ExportedModel, detector: nn.Module, cfg: Config,
                      metric: Optional[str] = None,
                      num_images: Optional[int] = None) -> Tuple[str, float]:
    """Measure the accuracy of an exported file on the config's validation data.

    Args:
        exported (ExportedModel): The file.
        detector (nn.Module): The detector that it was made of, on the CPU.
        cfg (Config): A complete config; see
            :func:`mmgcp.utils.config.with_fixed_size` for files of one size.
        metric (str, optional): See :func:`mmgcp.datasets.calibration.evaluate`.
        num_images (int, optional): See there.

    Returns:
        tuple[str, float]: Name and value of the metric.

    Raises:
        UserError: The data cannot be loaded, or the images have another size than the file takes.
    """
    return evaluate(ExportedDetector(detector, exported), cfg, metric, num_images)
