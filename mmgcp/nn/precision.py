# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Computing in the precision that tensors have, the same on each device."""
from contextlib import contextmanager, suppress
from typing import Any, Iterator, List, Tuple

import torch
from torch import Tensor

# A share of the largest square of an input: added to variances, it makes matrices invertible
TINY = 1e-12


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
    newer = [matmul, *(getattr(cudnn, name) for name in ('conv', 'rnn')
                       if has_setting(cudnn, name))]
    found += [(owner, 'fp32_precision', 'ieee') for owner in newer
              if has_setting(owner, 'fp32_precision')]
    return found


def has_setting(owner: Any, name: str) -> bool:
    """Whether torch has a setting; owners in older versions raise an AssertionError if not."""
    try:
        getattr(owner, name)
    except (AttributeError, AssertionError):
        return False
    return True


def at_least_single(tensor: Tensor) -> Tensor:
    """Turn half precision to single precision, to compute statistics; leave others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def add_products(sums: Tensor, inputs: Tensor, others: Tensor) -> None:
    """Add the products z y' of samples to sums of them, in place.

    Products of deviations from means are computed in the precision of the samples, all else in
    double precision: the means cancel later, where there are covariances.

    Args:
        sums (Tensor): The sums (G, I, O) in double precision.
        inputs (Tensor): z of S samples, (S, G, I).
        others (Tensor): y of the samples, (S, G, O).
    """
    count = len(inputs)
    if not count:
        return
    totals = [values.sum(0, dtype=torch.double) for values in (inputs, others)]
    means = [(total / count).to(inputs) for total in totals]
    deviations = [(values - mean).transpose(0, 1)
                  for values, mean in zip((inputs, others), means)]
    # As means m are rounded, the rest of z y' is m_z (sum y)' + (sum z - n m_z) m_y'
    first, second = (mean.double() for mean in means)
    sums += deviations[0].transpose(1, 2) @ deviations[1]
    sums.baddbmm_(first[:, :, None], totals[1][:, None])
    sums.baddbmm_((totals[0] - count * first)[:, :, None], second[:, None])
