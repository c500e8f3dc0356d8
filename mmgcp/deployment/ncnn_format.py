# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running ncnn's files."""
from pathlib import Path
from typing import List, Union

import numpy
import torch
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.utils.json_files import parse_json, read_text

from .exported import ExportedModel

META_SUFFIX = '.json'


class NcnnModel(ExportedModel):
    """A file of ncnn, on the CPU, in single precision; see :class:`ExportedModel`."""
    suffix, package = '.param', 'ncnn'

    def __init__(self, path: Union[str, Path], threads: int = 1):
        import ncnn
        super().__init__(path, threads)
        beside = self.path.with_suffix(META_SUFFIX)
        self.metadata = parse_json(read_text(beside, 'the description'),
                                   f'the description {beside}')
        self.output_names = self.metadata.pop('output_names')
        self.input_shape = tuple(self.metadata.pop('shape'))
        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        self.net.opt.use_vulkan_compute = False
        for name in ('packed', 'storage', 'arithmetic'):
            setattr(self.net.opt, f'use_fp16_{name}', False)
        self.net.opt.use_bf16_storage = False
        if self.net.load_param(str(path)) or self.net.load_model(
                str(self.path.with_suffix('.bin'))):
            raise UserError(f'ncnn cannot load {self.path}: it does not know all its layers')

    def run_batch(self, images: Tensor) -> List[Tensor]:
        """Run it; see :meth:`ExportedModel.run_batch`."""
        import ncnn
        array = images[0].numpy()
        read = ncnn.Mat(array)  # of the memory of the array: both have to stay
        run, outputs = self.net.create_extractor(), []
        run.input('in0', read)
        for number in range(len(self.output_names)):
            status, found = run.extract(f'out{number}')
            if status:
                raise UserError(f'ncnn cannot run {self.path}')
            outputs.append(torch.from_numpy(numpy.array(found))[None])
        return outputs
