# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running ncnn's files."""
import json
from pathlib import Path
from typing import List, Union

import torch
from torch import Tensor

from .exported import ExportedModel

META_SUFFIX = '.json'


class NcnnModel(ExportedModel):
    """A file of ncnn, on the CPU, in single precision; see :class:`ExportedModel`."""
    suffix, package = '.param', 'ncnn'

    def __init__(self, path: Union[str, Path], threads: int = 1):
        import ncnn
        super().__init__(path, threads)
        self.metadata = json.loads(self.path.with_suffix(META_SUFFIX).read_text())
        self.output_names = self.metadata.pop('output_names')
        self.input_shape = tuple(self.metadata.pop('shape'))
        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        self.net.opt.use_vulkan_compute = False
        for name in ('packed', 'storage', 'arithmetic'):
            setattr(self.net.opt, f'use_fp16_{name}', False)
        self.net.opt.use_bf16_storage = False
        self.net.load_param(str(path))
        self.net.load_model(str(self.path.with_suffix('.bin')))

    def run_batch(self, images: Tensor) -> List[Tensor]:
        """Run it; see :meth:`ExportedModel.run_batch`."""
        import ncnn
        with self.net.create_extractor() as run:
            run.input('in0', ncnn.Mat(images[0].numpy()).clone())
            found = [run.extract(f'out{number}')[1] for number in range(len(self.output_names))]
            return [torch.from_numpy(_array(mat))[None] for mat in found]


def _array(mat):
    import numpy
    return numpy.array(mat)
