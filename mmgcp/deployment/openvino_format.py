# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running OpenVINO's files."""
from pathlib import Path
from typing import List, Union

import torch
from torch import Tensor

from .exported import ExportedModel
from .metadata import from_text


class OpenVinoModel(ExportedModel):
    """A file of OpenVINO, on the CPU, in single precision; see :class:`ExportedModel`."""
    suffix, package = '.xml', 'openvino'

    def __init__(self, path: Union[str, Path], threads: int = 1):
        import openvino
        super().__init__(path, threads)
        model = openvino.Core().read_model(str(path))
        info = model.get_rt_info(['mmgcp']).value if model.has_rt_info(['mmgcp']) else {}
        self.metadata = from_text({key: _text(value) for key, value in info.items()})
        self.compiled = openvino.Core().compile_model(
            model, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'})
        self.output_names = [output.get_any_name() for output in self.compiled.outputs]
        shape = self.compiled.inputs[0].get_partial_shape()
        self.input_shape = tuple(side.get_length() if side.is_static else None for side in shape)

    def run_batch(self, images: Tensor) -> List[Tensor]:
        """Run it; see :meth:`ExportedModel.run_batch`."""
        results = self.compiled({0: images.numpy()})
        return [torch.from_numpy(results[output].copy()) for output in self.compiled.outputs]


def _text(value) -> str:
    return str(getattr(value, 'value', value))
