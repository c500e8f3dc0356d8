# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing networks in all formats."""
import json
import subprocess
import tempfile
from pathlib import Path
from typing import List, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError

from .metadata import Metadata, to_text
from .ncnn_format import META_SUFFIX, NcnnModel
from .onnx_format import OnnxModel, write_onnx
from .openvino_format import OpenVinoModel
from .options import ExportOptions


def companions(path: Path) -> Tuple[Path, ...]:
    """The files that a network consists of, the first one of which is named by the user."""
    if path.suffix == OpenVinoModel.suffix:
        return path, path.with_suffix('.bin')
    if path.suffix == NcnnModel.suffix:
        return path, path.with_suffix('.bin'), path.with_suffix(META_SUFFIX)
    return (path, )


def write(network: nn.Module, images: Tensor, path: Path, metadata: Metadata,
          options: ExportOptions) -> None:
    """Write a network in the format that the name of the file stands for.

    Args:
        network (nn.Module): Returns a flat tuple of tensors, and names them; in eval mode.
        images (Tensor): (N, C, H, W) to trace it with.
        path (Path): The file; see :func:`companions` for those beside it.
        metadata (dict): See :func:`mmgcp.deployment.metadata.describe`.
        options (ExportOptions): The options.

    Raises:
        UserError: The program that converts it fails.
    """
    write_tensors(network, images, path, metadata, options,
                  network.output_names(images.shape[1:]))


def write_tensors(network: nn.Module, images: Tensor, path: Path, metadata: Metadata,
                  options: ExportOptions, names: List[str]) -> None:
    """Write a network that does not name its outputs itself; see :func:`write`."""
    if path.suffix == OnnxModel.suffix:
        write_onnx(network, images, path, names, metadata, options.dynamic, options.opset)
    elif path.suffix == OpenVinoModel.suffix:
        with tempfile.TemporaryDirectory() as folder:
            onnx_path = Path(folder) / 'network.onnx'
            write_onnx(network, images, onnx_path, names, metadata, options.dynamic, options.opset)
            _convert_to_openvino(onnx_path, path, metadata)
    else:
        _write_ncnn(network, images, path, names, metadata)


def _convert_to_openvino(onnx_path: Path, path: Path, metadata: Metadata) -> None:
    import openvino
    model = openvino.convert_model(str(onnx_path))
    for key, text in to_text(metadata).items():
        model.set_rt_info(text, ['mmgcp', key])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_ncnn(network: nn.Module, images: Tensor, path: Path, names: List[str],
                metadata: Metadata) -> None:
    """Write a network by pnnx, whose other files go."""
    import pnnx
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / 'network.pt'
        with torch.no_grad():
            torch.jit.trace(network, images, check_trace=False).save(str(traced))
        shape = ','.join(map(str, images.shape))
        param, weights, meta = companions(path.resolve())
        others = [f'{name}={folder}/network.{suffix}' for name, suffix in (
            ('pnnxparam', 'pnnx.param'), ('pnnxbin', 'pnnx.bin'), ('pnnxpy', '_pnnx.py'),
            ('pnnxonnx', 'pnnx.onnx'), ('ncnnpy', '_ncnn.py'))]
        done = subprocess.run(
            [pnnx.EXEC_PATH, str(traced), f'inputshape=[{shape}]f32', f'ncnnparam={param}',
             f'ncnnbin={weights}', 'fp16=0', *others], cwd=folder, capture_output=True, text=True)
    if done.returncode or not param.is_file() or not weights.is_file():
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise UserError(f'pnnx cannot convert this detector: {lines[-1] if lines else "no reason"}')
    meta.write_text(json.dumps(dict(metadata, output_names=names, shape=list(images.shape)),
                               indent=2) + '\n')
