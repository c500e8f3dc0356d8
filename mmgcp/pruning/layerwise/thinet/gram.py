# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Choosing channels and factors from the products of the channels' contributions."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Eigenvalues of a Gram matrix below the largest one times this are noise
LEAST_EIGENVALUE = 1e-8


def removal_ranks(gram: Tensor, norm_groups: Optional[Tensor] = None) -> Tensor:
    """Remove channels greedily, in the order of ThiNet's algorithm 1.

    Args:
        gram (Tensor): Gram matrix (C, C) of the channels' contributions.
        norm_groups (Tensor, optional): Index (C, ) of the norm group of each channel; norm
            groups are removed as a whole.

    Returns:
        Tensor: Rank (C, ) of each channel or of its norm group in the order of removal, from
        zero.
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
    """Find the factors of the remaining channels that best replace the removed ones.

    With contributions X, they minimise ``||X @ 1 - X_kept @ w||`` (equation 7 of ThiNet). The
    system is solved for w - 1, without the directions in which the samples do not vary (whose
    eigenvalue is less than ``LEAST_EIGENVALUE`` times the largest one): there, w remains 1.

    Args:
        gram (Tensor): Gram matrix (C, C) of X.
        removed (Tensor): Indices (K, ) of the removed channels.

    Returns:
        Tensor: The factors (C, ) in double precision; 1 for removed channels.
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    factors = torch.ones(len(gram), dtype=torch.double)
    values, vectors = torch.linalg.eigh(gram.double()[~gone][:, ~gone])
    stable = values > LEAST_EIGENVALUE * values[-1].clamp(min=0)
    vectors = vectors[:, stable] / values[stable].sqrt()
    factors[~gone] += vectors @ (vectors.t() @ gram.double()[~gone][:, gone].sum(1))
    return factors
