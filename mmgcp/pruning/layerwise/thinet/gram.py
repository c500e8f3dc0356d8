# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Choosing channels and factors by the Gram matrix (C, C) of the channels' contributions."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Eigenvalues of a Gram matrix below the largest one times this are noise
LEAST_EIGENVALUE = 1e-8


def removal_ranks(gram: Tensor, norm_groups: Optional[Tensor] = None) -> Tensor:
    """Return the ranks (C, ) of channels in the order of removal of ThiNet's algorithm 1.

    Ranks start from zero. Channels with the same index (C, ) of the norm group are removed
    together and have the same rank.
    """
    numbers = torch.arange(len(gram)) if norm_groups is None else norm_groups
    members = F.one_hot(numbers).to(gram)
    gram = members.t() @ gram @ members
    growth = gram.diagonal().clone()  # of the squared sum, if this one is removed next
    ranks = torch.zeros(len(gram))
    for rank in range(len(gram)):
        chosen = int(growth.argmin())
        ranks[chosen] = rank
        growth += 2 * gram[chosen]
        growth[chosen] = float('inf')
    return ranks[numbers]


def least_squares_factors(gram: Tensor, removed: Tensor) -> Tensor:
    """Return the factors (C, ) with which the other channels replace the removed ones (K, ) best.

    With contributions X, they minimise ``||X @ 1 - X_kept @ w||`` (equation 7 of ThiNet). The
    system is solved for w - 1 and only in directions in which the samples vary (whose eigenvalue
    is not noise): in the others, w remains 1. Removed channels have the factor 1.
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    factors = torch.ones(len(gram), dtype=torch.double)
    values, vectors = torch.linalg.eigh(gram.double()[~gone][:, ~gone])
    stable = values > LEAST_EIGENVALUE * values[-1].clamp(min=0)
    vectors = vectors[:, stable] / values[stable].sqrt()
    factors[~gone] += vectors @ (vectors.t() @ gram.double()[~gone][:, gone].sum(1))
    return factors
