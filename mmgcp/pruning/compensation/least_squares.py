# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Linear least squares over samples that come in any number of portions."""
from dataclasses import dataclass, field
from typing import Dict, Hashable, NamedTuple, Tuple

import torch
from torch import Tensor

from mmgcp.nn.distributed import sum_by_name, sum_over_ranks
from mmgcp.nn.precision import TINY, add_products, at_least_single


class _Sums(NamedTuple):
    """Sums over the samples that share an offset, in double precision."""
    count: Tensor  # ()
    inputs: Tensor  # (G, I)
    targets: Tensor  # (G, O)

    def __add__(self, other: '_Sums') -> '_Sums':
        return _Sums(*(mine + theirs for mine, theirs in zip(self, other)))

    def to(self, device: torch.device) -> '_Sums':
        return _Sums(*(value.to(device) for value in self))


@dataclass
class LeastSquares:
    """Estimates targets (S, G, O) from inputs (S, G, I) by one matrix in each of G groups.

    Minimises sum |y - W z - b|^2 + r v |W - P|^2 over S samples, where v is the variance of an
    input, on average: the matrix W (G, O, I) is drawn towards a prior P as by r more samples.
    Samples may have different offsets b, told apart by keys; those with the key None have none,
    and the squares of their z count in v. Only sums are kept: their memory grows with I^2, but
    not with S.

    Attributes:
        prior (Tensor): P, (G, O, I).
        ridge (float): The number r of samples that the prior weighs as much as.
    """
    prior: Tensor
    ridge: float
    gram: Tensor = field(init=False)  # sum of z z', (G, I, I)
    cross: Tensor = field(init=False)  # sum of z y', (G, I, O)
    sums: Dict[Hashable, _Sums] = field(default_factory=dict, init=False)

    def __post_init__(self):
        groups, outputs, inputs = self.prior.shape
        self.prior = self.prior.double()
        self.gram = self.prior.new_zeros(groups, inputs, inputs)
        self.cross = self.prior.new_zeros(groups, inputs, outputs)

    def add(self, inputs: Tensor, targets: Tensor, key: Hashable) -> None:
        """Add samples: inputs (S, G, I) and targets (S, G, O) with the offset of a key."""
        count, inputs, targets = len(inputs), at_least_single(inputs), at_least_single(targets)
        sums = _Sums(self.prior.new_tensor(count), inputs.sum(0, dtype=torch.double),
                     targets.sum(0, dtype=torch.double))
        add_products(self.gram, inputs, inputs)
        add_products(self.cross, inputs, targets)
        self.sums[key] = self.sums[key] + sums if key in self.sums else sums

    def solve(self) -> Tuple[Tensor, Dict[Hashable, Tensor]]:
        """Return the matrix W (G, O, I), and the offset b (G, O) by key, from all ranks' samples.

        Without samples, or without inputs, the matrix is the prior.
        """
        sums = {key: item.to(self.prior.device) for key, item in sum_by_name(
            {key: item.to(torch.device('cpu')) for key, item in self.sums.items()}).items()}
        matrix = self._matrix(sums) if sums and self.prior.shape[2] else self.prior
        return matrix, {
            key: (item.targets - (matrix @ item.inputs[:, :, None])[..., 0]) / item.count
            for key, item in sums.items() if key is not None}

    def _matrix(self, sums: Dict[Hashable, _Sums]) -> Tensor:
        """Return W (G, O, I), for sums over all ranks."""
        gram, cross = sum_over_ranks(self.gram).clone(), sum_over_ranks(self.cross).clone()
        floor = TINY * gram.diagonal(dim1=1, dim2=2).amax(1) + 1e-30
        for key, item in sums.items():
            if key is not None:
                gram.baddbmm_(item.inputs[:, :, None], item.inputs[:, None] / -item.count)
                cross.baddbmm_(item.inputs[:, :, None], item.targets[:, None] / -item.count)
        residual = cross - gram @ self.prior.transpose(1, 2)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        number = sum(float(item.count) for item in sums.values())
        diagonal += (self.ridge / number * diagonal.mean(1) + floor)[:, None]
        change = torch.cholesky_solve(residual, torch.linalg.cholesky(gram))
        return self.prior + change.transpose(1, 2)
