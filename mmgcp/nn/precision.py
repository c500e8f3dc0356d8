# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Computing in the precision that tensors have, the same on each device."""
from contextlib import contextmanager, suppress
from typing import Any, Iterator, List, Tuple

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute without autocast and TF32, and reproducibly on a GPU.

    TF32, in which GPUs compute convolutions by default, keeps 10 of the 23 bits of a float32,
    too few to compare predictions or to decide between channels. Settings are restored.
    """
    settings = _settings()
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        with torch.autocast('cpu', enabled=False):
            if not torch.cuda.is_available():
                yield
            else:
                with torch.autocast('cuda', enabled=False):
                    yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


def _settings() -> List[Tuple[Any, str, Any]]:
    """Return the settings of full precision: the owner of each, its name and its value."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = [(cudnn, 'deterministic', True), (cudnn, 'benchmark', False)]
    for owner in (matmul, cudnn):
        with suppress(RuntimeError):  # it cannot be read where only the newer setting is in use
            owner.allow_tf32  # noqa: B018
            found.append((owner, 'allow_tf32', False))
    newer = [matmul, *(getattr(cudnn, name) for name in ('conv', 'rnn') if hasattr(cudnn, name))]
    found += [(owner, 'fp32_precision', 'ieee') for owner in newer
              if hasattr(owner, 'fp32_precision')]
    return found


def at_least_single(tensor: Tensor) -> Tensor:
    """Turn half precision to single precision, to compute statistics; leave others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
