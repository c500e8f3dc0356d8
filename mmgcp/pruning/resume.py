# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Resuming pruning layer by layer, or in several steps, after an interruption."""
import collections.abc
import hashlib
import json
from pathlib import Path
from typing import Any, Iterable, Optional, Union

import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from torch import Tensor

from mmgcp.nn.distributed import from_first_rank, total_over_ranks
from mmgcp.nn.training_loss import Batch
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.cli import replacing


def digest_request(request: Any, batches: Optional[Iterable[Batch]], model: nn.Module) -> str:
    """Return a digest of a request, the number of batches and the weights of the model.

    The request is anything that JSON can express; of other things in it, their ``repr`` counts.
    The number is that of all ranks, so that pruning can be resumed with another number of ranks.
    """
    number = None
    if isinstance(batches, collections.abc.Sized):
        number = total_over_ranks(len(batches))
    digest = hashlib.sha256(
        json.dumps([request, number], sort_keys=True, default=repr).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """The file from which pruning resumes, if any; files with another digest do not count.

    Of several ranks, the first one reads and writes it.
    """

    def __init__(self, path: Union[str, Path, None], digest: str):
        self._path = None if path is None else Path(path)
        self._digest = digest

    def load(self) -> Optional[dict]:
        """Return the last state of this request, or None; UserError if the file is unreadable."""
        state = None
        if is_main_process() and self._path is not None and self._path.exists():
            state = read_checkpoint(str(self._path))
            state = state if state.get('digest') == self._digest else None
        return from_first_rank(state)

    def save(self, **state) -> None:
        """Replace the last state by a new one; the folder is made if it does not exist."""
        if self._path is not None and is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (temporary, ):
                torch.save(dict(state, digest=self._digest), temporary)
