# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options that LCP and DCP share."""
from dataclasses import dataclass
from typing import Sequence

from mmgcp.errors import PruningError
from mmgcp.utils.checks import (
    BOOLEAN,
    LOSS_WEIGHT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    check_value,
    list_of,
    number_in,
)

EPOCHS = number_in(0, 10**6, integer=True)
CHECKS = dict(
    alpha=LOSS_WEIGHT, rounds=number_in(1, 10**6, integer=True), round_epochs=EPOCHS, epochs=EPOCHS,
    lr=POSITIVE, lr_steps=list_of(EPOCHS, 'must be a list of epochs', empty=True),
    momentum=number_in(0, 1, open_high=True), relative=BOOLEAN, aux_epochs=EPOCHS, aux_lr=POSITIVE,
    joint_lr=NOT_NEGATIVE, seed=SEED, cache_mib=NOT_NEGATIVE)


@dataclass(frozen=True)
class AuxiliarySettings:
    """Options of :class:`AuxiliaryCriterion`.

    Attributes:
        alpha (float): Weight of the auxiliary loss, called lambda in DCP. With 0 there are no
            auxiliary networks, and reconstruction alone decides. Defaults to 1.
        rounds (int): Number of rounds in which channels are chosen. Defaults to 1.
        round_epochs (int): Passes over the batches to fit the kernels after each round but the
            last. Defaults to 1.
        epochs (int): Passes over the batches to fit the kernels after channels were removed.
            Defaults to 10.
        lr (float): Learning rate of the kernels. Defaults to 1e-3.
        lr_steps (Sequence[int]): Epochs after which it is divided by ten. Defaults to (5, ).
        momentum (float): Momentum of SGD, for kernels, networks and detector. In all of them,
            gradients are clipped to a norm of 10. Defaults to 0.9.
        relative (bool): Divide the reconstruction error of each consumer by the mean square of
            its original output. Not in the papers: one learning rate then suits layers of any
            scale, such as those of a VGG without normalisation. Defaults to False.
        aux_epochs (int): Passes over the batches to train the auxiliary networks. Defaults
            to 5.
        aux_lr (float): Learning rate of the auxiliary networks. Defaults to 0.01.
        joint_lr (float): Learning rate of the detector while they are trained; with 0 the
            detector is not trained. Defaults to 1e-4.
        seed (int): Seed of the networks' initial weights. Defaults to 0.
        cache_mib (float): Memory in MiB, on the detector's device, for the inputs and original
            outputs of a unit's consumers. They stay the same while the kernels are fitted; for
            batches that do not fit, both the detector and its original copy run again in each
            pass. Defaults to 256.

    Raises:
        PruningError: A value is not allowed.
    """
    alpha: float = 1.
    rounds: int = 1
    round_epochs: int = 1
    epochs: int = 10
    lr: float = 1e-3
    lr_steps: Sequence[int] = (5, )
    momentum: float = 0.9
    relative: bool = False
    aux_epochs: int = 5
    aux_lr: float = 0.01
    joint_lr: float = 1e-4
    seed: int = 0
    cache_mib: float = 256.

    def __post_init__(self):
        for name, check in CHECKS.items():
            check_value(name, getattr(self, name), check, PruningError)
