# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""ONNX files that compute with 8-bit integers, for onnxruntime."""
import contextlib
import io
import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Set, Tuple

import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import UserError

from .metadata import Metadata, set_onnx_metadata
from .onnx_format import INPUT


def write_int8(source: Path, path: Path, images: Iterable[Tensor], metadata: Metadata,
               batch: int, size: Tuple[int, int], weight_bits: int = 8) -> None:
    """Quantise an ONNX file statically: 8 bits for activations and, channel by channel, weights.

    The convolutions that nothing but the predictions come from stay as they are, as do decoding
    and NMS: boxes need more than 256 values. The range of an activation is where all but a
    hundred-thousandth of its values are; that of all of them cost YOLOv5-n more AP.

    Args:
        source (Path): The file in single precision.
        path (Path): The file to write.
        images (Iterable[Tensor]): Batches (N, C, H, W) of training images, normalised, from which
            the ranges of activations are found. Those of another size are resized.
        metadata (dict): See :func:`mmgcp.deployment.metadata.describe`.
        batch (int): Number of images that the file takes at a time.
        size (tuple[int, int]): Height and width of the images in pixels.
        weight_bits (int): Bits of weights, 7 or 8. Defaults to 8.

    Raises:
        UserError: There are no images.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    reader = _Reader(images, batch, size)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / 'prepared.onnx'
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(path), reader, quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=weight_bits == 7, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_quantize=quantised_nodes(prepared),
            calibrate_method=CalibrationMethod.Percentile,
            # not for MinMax only: otherwise the activations of all images are kept together
            extra_options=dict(CalibStridedMinMax=1))
    set_onnx_metadata(path, dict(metadata, precision='int8'))


def quantised_nodes(path: Path) -> List[str]:
    """The nodes between the images and the last convolutions, which are not among them."""
    import onnx
    nodes = onnx.load(str(path)).graph.node
    readers: Dict[str, List[int]] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(number)
    chosen: Set[int] = set()  # from whose outputs a convolution is computed
    for number in range(len(nodes) - 1, -1, -1):  # against the order of computing
        following = [reader for name in nodes[number].output for reader in readers.get(name, ())]
        if any(nodes[reader].op_type == 'Conv' or reader in chosen for reader in following):
            chosen.add(number)
    return [nodes[number].name for number in sorted(chosen) if nodes[number].name]


class _Reader:
    """What onnxruntime's calibration asks for batches, one after the other or in ranges."""

    def __init__(self, images: Iterable[Tensor], batch: int, size: Tuple[int, int]):
        self._batches: List[Tensor] = []
        for group in images:
            if tuple(group.shape[-2:]) != tuple(size):
                group = F.interpolate(group, tuple(size), mode='bilinear', align_corners=False)
            self._batches += [part for part in group.split(batch) if len(part) == batch]
        if not self._batches:
            raise UserError('there are no training images to find the ranges of integers with')
        self.set_range(0, len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Choose the batches that come next."""
        self._coming = iter(self._batches[start_index:end_index])

    def get_next(self) -> Optional[dict]:
        """Return a batch, None after the last one."""
        part = next(self._coming, None)
        return None if part is None else {INPUT: part.contiguous().numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of onnxruntime's logging, and what it prints of its progress."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
