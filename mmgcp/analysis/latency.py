# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The time that a detector takes for an image."""
import statistics
import time
from typing import Sequence

import torch
import torch.nn as nn

from mmgcp.nn.forward import random_image, run_as_tensors
from mmgcp.nn.temporarily import eval_mode


@torch.no_grad()
def measure_latency(model: nn.Module, input_shape: Sequence[int], runs: int = 20,
                    warmup: int = 3) -> float:
    """Measure the time of a forward pass for one image, without post-processing.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`. It runs in
            eval mode; its modes are restored.
        input_shape (Sequence[int]): Shape (C, H, W) of the image in pixels.
        runs (int): Number of passes that are timed. Defaults to 20.
        warmup (int): Number of passes before these. Defaults to 3.

    Returns:
        float: The median in milliseconds, on the device of the model.
    """
    image, times = random_image(model, input_shape), []
    with eval_mode(model):
        for _ in range(warmup + runs):
            start = time.perf_counter()
            run_as_tensors(model, image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warmup:])
