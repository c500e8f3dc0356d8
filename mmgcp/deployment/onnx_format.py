# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""ONNX files: written by torch's own exporter, run by onnxruntime."""
import inspect
import warnings
from pathlib import Path
from typing import List, Sequence, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError

from .exported import ExportedModel
from .metadata import Metadata, from_text, set_onnx_metadata
from .predictions import DETECTIONS

INPUT = 'images'


@torch.no_grad()
def write_onnx(network: nn.Module, images: Tensor, path: Path, output_names: Sequence[str],
               metadata: Metadata, dynamic: str = 'none', opset: int = 13) -> None:
    """Write a network as an ONNX file, by the exporter of torch that needs nothing but onnx.

    Args:
        network (nn.Module): Returns a flat tuple of tensors; in eval mode.
        images (Tensor): (N, C, H, W) to trace it with.
        path (Path): The file.
        output_names (Sequence[str]): Names of the outputs, in their order.
        metadata (dict): See :func:`mmgcp.deployment.metadata.describe`.
        dynamic (str): What of the shape of the images is left open: ``'none'``, ``'batch'``,
            ``'size'`` or ``'both'``. Defaults to ``'none'``.
        opset (int): Version of ONNX's set of operations. Defaults to 13.

    Raises:
        UserError: PyTorch cannot export the network.
    """
    inner, outer = {}, {}
    if dynamic in ('batch', 'both'):
        inner, outer = {0: 'batch'}, {0: 'batch'}
    if dynamic in ('size', 'both'):
        inner = {**inner, 2: 'height', 3: 'width'}
    axes = {INPUT: inner} if inner else {}
    for name in output_names if inner else ():
        places = dict(outer)
        if 2 in inner and name not in DETECTIONS:
            places.update({2: f'{name}_height', 3: f'{name}_width'})
        if places:
            axes[name] = places
    settings = dict(opset_version=opset, input_names=[INPUT], output_names=list(output_names),
                    dynamic_axes=axes)
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        settings['dynamo'] = False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer, about what the check will find
        try:
            torch.onnx.export(network, (images, ), str(path), **settings)
        except RuntimeError as error:  # among them those of the exporter
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'PyTorch cannot export this detector: {reason}') from error
    set_onnx_metadata(path, metadata)


class OnnxModel(ExportedModel):
    """An ONNX file in onnxruntime, on the CPU; see :class:`ExportedModel`."""
    suffix, package = '.onnx', 'onnxruntime'

    def __init__(self, path: Union[str, Path], threads: int = 1):
        import onnxruntime
        super().__init__(path, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider'])
        self.metadata = from_text(self.session.get_modelmeta().custom_metadata_map)
        self.output_names = [output.name for output in self.session.get_outputs()]
        (images, ) = self.session.get_inputs()
        self.input_shape = tuple(side if isinstance(side, int) else None for side in images.shape)

    def run_batch(self, images: Tensor) -> List[Tensor]:
        """Run it; see :meth:`ExportedModel.run_batch`."""
        outputs = self.session.run(None, {INPUT: images.numpy()})
        return [torch.from_numpy(output) for output in outputs]
