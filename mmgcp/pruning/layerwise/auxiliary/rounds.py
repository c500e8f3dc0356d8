# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Selecting channels in rounds, by the gradients of the kernels that read them."""
import torch
from torch import Tensor

from .joint_loss import JointLoss


def score_in_rounds(loss: JointLoss, centred: bool) -> Tensor:
    """Score the channels of a unit, beginning without any of them.

    Each round but the last selects an equal share of the channels, those with the largest
    gradients, and fits their kernels. A generalisation of algorithm 2 of DCP (`arXiv 1810.11809
    <https://arxiv.org/abs/1810.11809>`_), which selects one channel in a round.

    Args:
        loss (JointLoss): The loss of the unit, of size C. Its kernels change.
        centred (bool): See :meth:`Reconstructor.error`.

    Returns:
        Tensor: Scores (C, ) in double precision. With one round, the squared norms of the
        gradients. With several, the integer part is the number of rounds left after the one
        that selects the channel, and the fractional part, at most 1/2, its share of the
        largest norm in the last round in which it was scored.
    """
    kernels, rounds = loss.kernels, loss.settings.rounds
    selected = torch.zeros(loss.unit.size, dtype=torch.bool)
    scores = torch.zeros(loss.unit.size, dtype=torch.double)
    values = kernels.copy()
    kernels.clear()
    for rounds_left in range(rounds, 0, -1):
        others = (~selected).nonzero().flatten()
        if not len(others):
            break
        norms = kernels.norms(loss.mean_gradients(centred))
        if rounds == 1:
            return norms
        shares = norms[others] / norms[others].max().clamp(min=1e-300)
        scores[others] = rounds_left - 1 + shares / 2
        if rounds_left > 1:
            number = -(-len(others) // rounds_left)
            best = others[norms[others].argsort(descending=True, stable=True)[:number]]
            kernels.restore_channels(values, loss.unit.mask(best))
            selected[best] = True
            loss.minimise(selected, loss.settings.round_epochs, centred)
    return scores
