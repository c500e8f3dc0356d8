# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Resuming pruning layer by layer, or in several steps, after an interruption."""
import collections.abc
import hashlib
import json
from pathlib import Path
from typing import Any, Iterable, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.cli import replacing


def digest_request(request: Any, batches: Optional[Iterable[Batch]], model: nn.Module) -> str:
    """Return a digest of a request, the number of batches and the weights of the model.

    The request is anything that JSON can express; of other things in it, their ``repr`` counts.
    """
    number = len(batches) if isinstance(batches, collections.abc.Sized) else None
    digest = hashlib.sha256(
        json.dumps([request, number], sort_keys=True, default=repr).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """The file from which pruning resumes, if any; files with another digest do not count."""

    def __init__(self, path: Union[str, Path, None], digest: str):
        self._path = None if path is None else Path(path)
        self._digest = digest

    def load(self) -> Optional[dict]:
        """Return the last state of this request, or None; UserError if the file is unreadable."""
        if self._path is None or not self._path.exists():
            return None
        state = read_checkpoint(str(self._path))
        return state if state.get('digest') == self._digest else None

    def save(self, **state) -> None:
        """Replace the last state by a new one; the folder is made if it does not exist."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (temporary, ):
                torch.save(dict(state, digest=self._digest), temporary)
