# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a detector, most of the time on an image of noise."""
from contextlib import contextmanager, suppress
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .hooks import hooked

# Shape (C, H, W) of an image that detectors run on which do not run on small ones
IMAGE_SHAPE = (3, 640, 640)
# What takes the time of a forward pass, and what leaves shapes as they are
COSTLY = {F.conv2d, F.conv_transpose2d, F.linear}
POINTWISE = {F.batch_norm, F.silu, F.relu, F.relu6, F.leaky_relu, F.mish, F.hardswish,
             F.hardsigmoid, torch.sigmoid, Tensor.sigmoid}


def random_image(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Make an image of noise, the same at every call.

    Args:
        model (nn.Module): Says the device and the precision.
        shape (Sequence[int]): Shape (C, H, W) in pixels.

    Returns:
        Tensor: A batch (1, C, H, W) with values in [0, 1).
    """
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return image.to(next(model.parameters()))


def run_as_tensors(model: nn.Module, image: Tensor):
    """Run a detector without decoding its predictions.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``, or one
            of MMDetection's two-stage detectors.
        image (Tensor): Batch (N, C, H, W) of images.

    Returns:
        tuple | list | dict: The raw predictions, nested as the model has them.
    """
    if hasattr(model, 'roi_head') and hasattr(model, 'rpn_head'):
        return _run_two_stage(model, image)
    return model(image, mode='tensor')


def _run_two_stage(model: nn.Module, image: Tensor):
    """Both stages of a detector, the second one on fixed proposals.

    The proposals of its own depend on the first stage's scores by sorting, without gradients.
    """
    sizes = image.new_tensor([[56.], [112.], [224.], [448.]])  # one for each level of an FPN
    boxes = torch.cat((torch.zeros(4, 2).to(image), sizes, sizes), 1)
    features = model.extract_feat(image)
    proposals = [InstanceData(bboxes=boxes) for _ in image]
    return model.rpn_head(features), model.roi_head(features, proposals)


@torch.no_grad()
def run_with_hooks(model: nn.Module, shape: Sequence[int], handles: Iterable) -> None:
    """Run a detector once in eval mode, then remove hooks and restore the modes.

    Args:
        model (nn.Module): The detector; see :func:`run_as_tensors`.
        shape (Sequence[int]): Shape (C, H, W) of the image in pixels.
        handles (Iterable): Handles of the hooks that look at the run.
    """
    with hooked(handles), eval_mode(model):
        run_as_tensors(model, random_image(model, shape))


class ShortRuns:
    """Runs a detector only as far as hooks look at it.

    Each hook has to call :meth:`seen` when it is through. How often they do is the same in
    each run; if it is not known, the first run is whole.

    Args:
        model (nn.Module): The detector; see :func:`run_as_tensors`.
        number (int, optional): How often hooks look at a run. Defaults to None.
    """

    def __init__(self, model: nn.Module, number: Optional[int] = None):
        self._model = model
        self._number = 0
        self._last = number

    def __call__(self, images: Tensor) -> None:
        """Run the detector on images (N, C, H, W)."""
        self._number = 0
        with suppress(_SeenAll):
            run_as_tensors(self._model, images)
        self._last = self._number

    def seen(self) -> None:
        """Count that a hook has looked at the run, and end the run after the last."""
        self._number += 1
        if self._number == self._last:
            raise _SeenAll


class _SeenAll(Exception):
    """The hooks have looked at everything in a run."""


def record_shapes(model: nn.Module, layers: Dict[str, nn.Module],
                  shape: Sequence[int]) -> List[Tuple[str, torch.Size, torch.Size]]:
    """Run a detector in eval mode and record the shapes that its layers see.

    Nothing is computed by convolutions and linear layers, so that it costs little. Detectors
    that do not run on the zeros that they emit instead run in earnest.

    Args:
        model (nn.Module): The detector; see :func:`run_as_tensors`.
        layers (dict[str, nn.Module]): The layers to look at, by any names.
        shape (Sequence[int]): Shape (C, H, W) of the image in pixels.

    Returns:
        list[tuple]: Name, and shapes of the first input and of the output, for each time a
        layer ran, in this order.
    """
    runs: List[Tuple[str, torch.Size, torch.Size]] = []

    def hook(name):
        def record(_, args, output):
            runs.append((name, args[0].shape, output.shape))
        return record

    def run():
        runs.clear()
        run_with_hooks(model, shape, [layer.register_forward_hook(hook(name))
                                      for name, layer in layers.items()])

    try:
        with _ShapesOnly():
            run()
    except Exception:  # whatever the model raises; it may be for the zeros
        run()
    return runs


class _ShapesOnly(TorchFunctionMode):
    """Let convolutions and linear layers emit zeros, and pointwise functions their inputs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in POINTWISE:
            return args[0]
        if func not in COSTLY:
            return func(*args, **kwargs)
        shape = func(args[0][:0], *args[1:], **kwargs).shape
        return args[0].new_zeros(len(args[0]), *shape[1:])


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode and restore their modes at the end.

    Unlike ``model.eval()`` it does not let backbones freeze their stages.
    """
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def working_shape(model: nn.Module, input_shape: Sequence[int]) -> Sequence[int]:
    """Return a small shape of an image that a model runs on, to look at its structure.

    Args:
        model (nn.Module): The detector.
        input_shape (Sequence[int]): Shape (C, H, W) that it is used with.

    Returns:
        Sequence[int]: (C, 128, 128), or the given shape if the model does not run on that,
        such as SSD300.
    """
    small = (input_shape[0], 128, 128)
    try:
        record_shapes(model, {}, small)
    except RuntimeError:
        return input_shape
    return small
