# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Exporting a detector: fused, written, run at once and compared with PyTorch."""
import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from mmengine.config import Config, ConfigDict

from mmgcp.datasets.calibration import ImagesOf, calibration_batches, evaluate
from mmgcp.errors import UserError
from mmgcp.spatial import find_inference
from mmgcp.utils.checks import INPUT_SHAPE, check_value
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import with_fixed_size

from .check import raw_difference, sample_images, telling_threshold
from .exported import (
    FORMATS,
    evaluate_exported,
    is_installed,
    open_exported,
    require,
)
from .fusion import fused
from .int8 import write_int8
from .metadata import Metadata, describe
from .nms_check import detections_difference
from .options import SUFFIXES, ExportOptions
from .predictions import Detections, RawPredictions
from .writers import companions, write

Report = Callable[[str], Any]
NEEDED = dict(onnx=['onnx'], openvino=['onnx', 'openvino'], ncnn=['pnnx'])  # to write files
DEFAULT_VAL_IMAGES = 100  # for int8


@dataclass
class Exported:
    """What :func:`export_detector` wrote.

    Attributes:
        files (list[Path]): The files of networks: the first one, and the int8 one if there is one.
        difference (float | None): The largest one from PyTorch; None where nothing could run it.
        accuracy (dict[str, float]): By ``'PyTorch'`` and the name of the file, if measured.
    """
    files: List[Path]
    difference: Optional[float] = None
    accuracy: Dict[str, float] = field(default_factory=dict)


def export_detector(model: nn.Module, cfg: Config, path: Union[str, Path], shape: Sequence[int],
                    options: Optional[ExportOptions] = None, meta: Optional[dict] = None,
                    report: Report = print) -> Exported:
    """Export a detector, pruned or not, and compare the file with it.

    Args:
        model (nn.Module): The detector, on the CPU; it is not changed.
        cfg (Config): Its config.
        path (str | Path): The file to write, which is replaced if it is there.
        shape (Sequence[int]): Shape (C, H, W) of the images in pixels.
        options (ExportOptions, optional): Defaults to None: the defaults of all.
        meta (dict, optional): The ``meta`` of its checkpoint, where names of classes may be.
        report (Callable): Gets lines of text. Defaults to print.

    Returns:
        Exported: The files and what was found.

    Raises:
        UserError: It cannot be exported, a package is missing, or the file computes something
            else than the detector. There is no new file then.
    """
    options, path = options or ExportOptions(), Path(path)
    _check_request(options, path, shape, model)
    network = _network(fused(model, shape), options)
    metadata = describe(model, cfg, meta or {}, shape, 'detections' if options.nms else 'raw')
    result = Exported([path])
    with replacing(*companions(path)) as temporary:
        write(network, sample_images(model, (_batch(options), *shape)), temporary[0], metadata,
              options)
        if is_installed(FORMATS[path.suffix].package):
            result.difference = _largest_difference(model, network, temporary[0], shape, metadata,
                                                    options)
            report(f'largest difference from PyTorch: {result.difference:.1e}')
            if not result.difference <= options.tolerance:
                raise UserError(
                    f'the file is {result.difference:.1e} from what PyTorch computes, more than '
                    f'the tolerance {options.tolerance:g}: it has not been kept')
        else:
            report(f'not compared with PyTorch: that needs {FORMATS[path.suffix].package} '
                   f'(pip install {FORMATS[path.suffix].package})')
    report(f'written to {path}')
    if options.int8:
        result.files.append(_int8_file(model, cfg, path, options, shape, metadata, report))
    _measure(result, model, cfg, options, report)
    return result


def _check_request(options: ExportOptions, path: Path, shape: Sequence[int],
                   model: nn.Module) -> None:
    """Raise a UserError for what can be known before anything is done."""
    check_value('input_shape', shape, INPUT_SHAPE)
    suffix = SUFFIXES[options.format]
    if path.suffix != suffix:
        raise UserError(f'the name of the file has to end in {suffix}, but is {path}')
    if not path.parent.is_dir():
        raise UserError(f'there is no folder {path.parent}')
    if find_inference(model) is not None:
        raise UserError('a detector of mmgcp.SpatialPruner is not exported, because what it '
                        'computes depends on the image: export it by the config of the dense '
                        'detector, which its checkpoint fits')
    RawPredictions(model)
    if options.nms:
        Detections(model)
    for package in NEEDED[options.format]:
        require(package, 'to write such files')
    if options.int8:
        require('onnxruntime', 'for int8')
    steps = getattr(model.bbox_head, 'featmap_strides', None)  # MMYOLO's necks join all levels
    if steps and any(side % max(steps) for side in shape[1:]):
        raise UserError(f'the size of the images has to be a multiple of {max(steps)}, but is '
                        f'{shape[2]} x {shape[1]}')


def _batch(options: ExportOptions) -> int:
    """Images to trace with; two where it is left open, as networks may treat one as any."""
    return 2 if options.dynamic in ('batch', 'both') else options.batch


def _network(detector: nn.Module, options: ExportOptions,
             score_thr: Optional[float] = None) -> nn.Module:
    """What goes into the file; with another ``score_thr`` than ``test_cfg`` has, if given."""
    if not options.nms:
        return RawPredictions(detector).eval()
    network = Detections(detector, options.dynamic not in ('size', 'both')).eval()
    if score_thr is not None:
        network.best_boxes.score_thr = score_thr
    return network


def _shapes(options: ExportOptions, shape: Sequence[int],
            model: nn.Module) -> List[Tuple[int, int, int, int]]:
    """The shapes to compare with: of what is left open, another value, too."""
    found = [(_batch(options), *shape)]
    batch, size = options.dynamic in ('batch', 'both'), options.dynamic in ('size', 'both')
    if batch or size:
        steps = getattr(model.bbox_head, 'featmap_strides', [32])
        more = max(steps) if size else 0
        found.append((3 if batch else options.batch, shape[0], shape[1] + more, shape[2]))
    return found


def _largest_difference(model: nn.Module, network: nn.Module, path: Path, shape: Sequence[int],
                        metadata: Metadata, options: ExportOptions) -> float:
    """Run a file on images of noise, and compare it with the detector."""
    exported = open_exported(path)
    batches = [sample_images(model, item) for item in _shapes(options, shape, model)]
    if not options.nms:
        return max(raw_difference(exported, model, images) for images in batches)
    test_cfg = ConfigDict(copy.deepcopy(dict(model.bbox_head.test_cfg)))
    found = [detections_difference(exported, model, images, test_cfg) for images in batches]
    threshold = telling_threshold(model, batches[0], test_cfg)
    if threshold is not None:  # little is found in noise: compare a twin that finds more
        test_cfg.score_thr = threshold
        with tempfile.TemporaryDirectory() as folder:
            twin = Path(folder) / f'twin{path.suffix}'
            write(_network(network.detector, options, threshold), batches[0], twin, metadata,
                  options)
            exported = open_exported(twin)
            found += [detections_difference(exported, model, images, test_cfg)
                      for images in batches]
    return max(found)


def _int8_file(model: nn.Module, cfg: Config, path: Path, options: ExportOptions,
               shape: Sequence[int], metadata: Metadata, report: Report) -> Path:
    """Write the file with integers beside the other one, run it, and say how large it is."""
    target = path.with_name(f'{path.stem}-int8{path.suffix}')
    images = ImagesOf(calibration_batches(cfg, model, options.calib_batches))
    batch = 1 if options.dynamic in ('batch', 'both') else options.batch
    with replacing(target) as (temporary, ):
        write_int8(path, temporary, images, metadata, batch, tuple(shape[1:]),
                   options.weight_bits)
        open_exported(temporary).run(sample_images(model, (batch, *shape)))
    sizes = [item.stat().st_size / 2**20 for item in (path, target)]
    report(f'written to {target}: {sizes[1]:.2f} MiB instead of {sizes[0]:.2f}')
    return target


def _measure(result: Exported, model: nn.Module, cfg: Config, options: ExportOptions,
             report: Report) -> None:
    """Measure the accuracy of the detector and of all files, on the same images."""
    number = options.val_images
    if number is None:
        number = DEFAULT_VAL_IMAGES if options.int8 else 0
    if not number:
        return
    if options.dynamic not in ('size', 'both'):
        cfg = with_fixed_size(cfg)
    try:
        name, value = evaluate(model, cfg, num_images=number)
        result.accuracy['PyTorch'] = value
        for path in result.files:
            result.accuracy[path.name] = evaluate_exported(
                open_exported(path), model, cfg, name, number)[1]
    except UserError as error:
        if options.val_images is not None:
            raise
        report(f'accuracy not measured: {error}')
        return
    report(f'{name} on at most {number} validation images: '
           + ', '.join(f'{key} {value:.4f}' for key, value in result.accuracy.items()))
