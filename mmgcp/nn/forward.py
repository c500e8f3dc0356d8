# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a detector, mostly on an image of noise."""
import inspect
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .hooks import on_outputs
from .layers import CONV_TYPES
from .temporarily import eval_mode

# Shape (C, H, W) of the images for detectors that do not run on small ones
IMAGE_SHAPE = (3, 640, 640)
# Attribute of a detector whose backbone and neck alone are run
HEAD_LEFT_OUT = '_mmgcp_head_left_out'
# Functions that take most of the time of a forward pass, and functions that keep shapes
COSTLY = {F.conv2d, F.conv_transpose2d, F.linear}
POINTWISE = {F.batch_norm, F.silu, F.relu, F.relu6, F.leaky_relu, F.mish, F.hardswish,
             F.hardsigmoid, torch.sigmoid, Tensor.sigmoid}


def random_image(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Make a batch (1, C, H, W) with values in [0, 1), the same in each call, for a model.

    It has the device and the precision of the model.
    """
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return image.to(next(model.parameters()))


@contextmanager
def head_left_out_on_demand(model: nn.Module) -> Iterator[None]:
    """Take back, at the end of a block, that :func:`leave_head_out` was called in it."""
    before = HEAD_LEFT_OUT in model.__dict__
    try:
        yield
    finally:
        if not before:
            model.__dict__.pop(HEAD_LEFT_OUT, None)


def leave_head_out(model: nn.Module) -> None:
    """Let :func:`run_as_tensors` run only the backbone and neck of a detector, or of a copy."""
    model.__dict__[HEAD_LEFT_OUT] = True


@contextmanager
def parts_only(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Leave the head of a detector out in a block if all modules named are in other parts."""
    with head_left_out_on_demand(model):
        if are_in_parts(model, names):
            leave_head_out(model)
        yield


def are_in_parts(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether modules are in the backbone and neck, which a detector runs by themselves."""
    return hasattr(model, 'extract_feat') and all(
        name.split('.')[0] in ('backbone', 'neck') for name in names)


def is_head_left_out(model: nn.Module) -> bool:
    """Whether :func:`leave_head_out` was called."""
    return HEAD_LEFT_OUT in model.__dict__


def run_as_tensors(model: nn.Module, image: Tensor):
    """Run a detector on images (N, C, H, W) without decoding its predictions.

    It is a detector that understands ``model(x, mode='tensor')``, or one of MMDetection's
    two-stage detectors, whose second stage runs on fixed proposals: its own come from sorting
    the scores of the first stage, which has no gradient. Returns the raw predictions, nested as
    the model has them; the feature maps that the head reads, if that is left out.
    """
    if is_head_left_out(model):
        return model.extract_feat(image)
    if not (hasattr(model, 'roi_head') and hasattr(model, 'rpn_head')):
        return model(image, mode='tensor')
    sizes = image.new_tensor([[56.], [112.], [224.], [448.]])  # one for each level of an FPN
    boxes = torch.cat((torch.zeros(4, 2).to(image), sizes, sizes), 1)
    features = model.extract_feat(image)
    proposals = [InstanceData(bboxes=boxes) for _ in image]
    inputs = [features, proposals]
    if 'batch_data_samples' in inspect.signature(model.roi_head.forward).parameters:
        size = tuple(image.shape[2:])  # for which the stages of a cascade ask
        inputs.append([DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size))
                       for _ in image])
    return model.rpn_head(features), model.roi_head(*inputs)


@torch.no_grad()
def run_on_noise(model: nn.Module, shape: Sequence[int]) -> Any:
    """Run a detector in eval mode on noise of a shape (C, H, W); return its raw predictions."""
    with eval_mode(model):
        return run_as_tensors(model, random_image(model, shape))


def flatten_tensors(outputs: Any) -> List[Tensor]:
    """Return all tensors of nested lists, tuples and dictionaries."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for item in outputs for tensor in flatten_tensors(item)]
    return []


class ShortRuns:
    """Runs a detector only until hooks have seen everything they look for.

    Each hook has to call :meth:`seen` when it is done. The number of these calls must be the
    same in each run; if it is not given, the first run is a whole one.
    """

    def __init__(self, model: nn.Module, number: Optional[int] = None):
        self._model = model
        self._number = 0
        self._last = number

    def __call__(self, images: Tensor) -> None:
        """Run the detector on images (N, C, H, W)."""
        self._number = 0
        with suppress(_SeenAllError):
            run_as_tensors(self._model, images)
        self._last = self._number

    def seen(self) -> None:
        """Count a call of a hook, and end the run after the last one."""
        self._number += 1
        if self._number == self._last:
            raise _SeenAllError


class _SeenAllError(Exception):
    """The hooks have seen everything in a run."""


def record_shapes(model: nn.Module, names: Iterable[str],
                  shape: Sequence[int]) -> List[Tuple[str, torch.Size, torch.Size]]:
    """Run a detector on noise of a shape (C, H, W), and record the shapes its layers read and emit.

    Convolutions and linear layers emit zeros instead of computing anything, which saves most
    of the time. A detector that cannot run on these zeros is run a second time, computing
    everything. Returns the name, the shape of the input and the shape of the output for each run
    of a layer, in the order of the runs.
    """
    runs: List[Tuple[str, torch.Size, torch.Size]] = []

    def record(name, inputs, output):
        runs.append((name, inputs.shape, output.shape))

    with on_outputs(model, {name: partial(record, name) for name in names}):
        try:
            with _ShapesOnly():
                run_on_noise(model, shape)
        except Exception:  # whatever the model raises, perhaps because of the zeros
            runs.clear()
            run_on_noise(model, shape)
    return runs


class _ShapesOnly(TorchFunctionMode):
    """Makes convolutions and linear layers emit zeros, and pointwise functions their inputs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in POINTWISE:
            return args[0]
        if func not in COSTLY:
            return func(*args, **kwargs)
        shape = func(args[0][:0], *args[1:], **kwargs).shape
        return args[0].new_zeros(len(args[0]), *shape[1:])


def working_shape(model: nn.Module, input_shape: Sequence[int] = IMAGE_SHAPE) -> Sequence[int]:
    """Return the shape of a small image that a model runs on, to look at its structure.

    It is (C, 128, 128), or the height and width of the images (C, H, W) that the model is meant
    for, if it does not run on that, as SSD300 does not. If the model does not run on images of C
    channels either, it is of as many as its first convolution reads, or a fourth of that, as
    behind a Focus. The given shape is returned if nothing runs.
    """
    channels = [input_shape[0]]
    first = next((layer for layer in model.modules() if isinstance(layer, CONV_TYPES)), None)
    if first is not None:
        channels += [first.in_channels, first.in_channels // 4]
    for shape in ((number, *size) for number in dict.fromkeys(channels) if number
                  for size in dict.fromkeys(((128, 128), tuple(input_shape[1:])))):
        try:
            record_shapes(model, (), shape)
        except RuntimeError:
            continue
        return shape
    return input_shape
