# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Linear least squares over samples that come in any number of portions."""
import math
from dataclasses import dataclass, field
from typing import Dict, Hashable, NamedTuple, Tuple

import torch
from torch import Tensor

from mmgcp.nn.distributed import sum_by_name, sum_over_ranks
from mmgcp.nn.precision import at_least_single

# Added to the ridge, as a share of the largest diagonal entry, so that matrices are invertible
TINY = 1e-12


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

    Minimises sum |y - W z - b|^2 / n + r |W - P|^2: the ridge r, a share of the mean square of
    the inputs, pulls the matrix W (G, O, I) towards a prior P. Samples may have different offsets
    b, told apart by keys; those with the key None have none. Only sums are kept: their memory
    grows with I^2, but not with the number of samples. With an infinite ridge W is P.

    Attributes:
        prior (Tensor): P, (G, O, I).
        ridge (float): The share.
    """
    prior: Tensor
    ridge: float
    gram: Tensor = field(init=False)  # sum of z z', (G, I, I)
    cross: Tensor = field(init=False)  # sum of z y', (G, I, O)
    sums: Dict[Hashable, _Sums] = field(default_factory=dict, init=False)

    def __post_init__(self):
        groups, outputs, inputs = self.prior.shape
        self.prior = self.prior.double()
        inputs *= not math.isinf(self.ridge)
        self.gram = self.prior.new_zeros(groups, inputs, inputs)
        self.cross = self.prior.new_zeros(groups, inputs, outputs)

    def add(self, inputs: Tensor, targets: Tensor, key: Hashable) -> None:
        """Add samples: inputs (S, G, I) and targets (S, G, O) with the offset of a key.

        Products are computed in the precision of the samples, and summed in double precision.
        """
        inputs = at_least_single(inputs).transpose(0, 1)
        targets = at_least_single(targets).transpose(0, 1)
        if not math.isinf(self.ridge):
            self.gram += inputs.transpose(1, 2) @ inputs
            self.cross += inputs.transpose(1, 2) @ targets
        sums = _Sums(self.prior.new_tensor(inputs.shape[1]),
                     inputs.double().sum(1), targets.double().sum(1))
        self.sums[key] = self.sums[key] + sums if key in self.sums else sums

    def solve(self) -> Tuple[Tensor, Dict[Hashable, Tensor]]:
        """Return the matrix W (G, O, I), and the offset b (G, O) by key, from all ranks' samples.

        Without samples it is the prior.
        """
        sums = {key: item.to(self.prior.device) for key, item in sum_by_name(
            {key: item.to(torch.device('cpu')) for key, item in self.sums.items()}).items()}
        matrix = self.prior if math.isinf(self.ridge) or not sums else self._matrix(sums)
        return matrix, {
            key: (item.targets - (matrix @ item.inputs[:, :, None])[..., 0]) / item.count
            for key, item in sums.items() if key is not None}

    def _matrix(self, sums: Dict[Hashable, _Sums]) -> Tensor:
        """Return W (G, O, I), for sums over all ranks."""
        gram, cross = sum_over_ranks(self.gram), sum_over_ranks(self.cross)
        for key, item in sums.items():
            if key is not None:
                gram = gram - item.inputs[:, :, None] @ item.inputs[:, None] / item.count
                cross = cross - item.inputs[:, :, None] @ item.targets[:, None] / item.count
        diagonal = gram.diagonal(dim1=1, dim2=2)
        ridge = self.ridge * diagonal.mean(1) + TINY * diagonal.amax(1) + 1e-30
        regular = gram + torch.diag_embed(ridge[:, None].expand_as(diagonal))
        residual = cross - gram @ self.prior.transpose(1, 2)
        change = torch.cholesky_solve(residual, torch.linalg.cholesky(regular))
        return self.prior + change.transpose(1, 2)
