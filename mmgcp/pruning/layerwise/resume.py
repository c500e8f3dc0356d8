# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Going on with pruning layer by layer after an interruption."""
import collections.abc
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Iterable, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.plan import PruningPlan
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.cli import replacing


def digest_request(plan: PruningPlan, batches: Iterable[Batch], model: nn.Module) -> str:
    """Return a hexadecimal number that identifies a request.

    Args:
        plan (PruningPlan): The plan of the allocation, with all options.
        batches (Iterable[Batch]): Training batches, of which only the number counts.
        model (nn.Module): The model.

    Returns:
        str: The number, another one for other options, allocations or weights.
    """
    number = len(batches) if isinstance(batches, collections.abc.Sized) else None
    digest = hashlib.sha256(
        json.dumps([asdict(plan), number], sort_keys=True, default=repr).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """The file from which pruning goes on after an interruption.

    Args:
        path (str | Path, optional): The file; None for none.
        digest (str): Of the request; a file of another one does not count.
    """

    def __init__(self, path: Union[str, Path, None], digest: str):
        self._path = None if path is None else Path(path)
        self._digest = digest

    def load(self) -> Optional[dict]:
        """Return what was saved last for this request, or None.

        Raises:
            UserError: The file cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        state = read_checkpoint(str(self._path))
        return state if state.get('digest') == self._digest else None

    def save(self, **state) -> None:
        """Save a state in place of the last one; the folder is made if there is none."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (temporary, ):
                torch.save(dict(state, digest=self._digest), temporary)
