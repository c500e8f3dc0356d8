# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Resuming pruning layer by layer, or in several steps, after an interruption."""
import collections.abc
import glob
import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any, Iterable, List, Optional, Union

import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from torch import Tensor

from mmgcp.nn.distributed import from_first_rank, total_over_ranks
from mmgcp.nn.training_loss import Batch
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.checkpoint_files import save_checkpoint
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

    The state of another request is kept beside it, as ``NAME-other-1.pth`` and so on, from which
    that request goes on when it is made again. Of several ranks, the first one reads and writes.
    """

    def __init__(self, path: Union[str, Path, None], digest: str):
        self._path = None if path is None else Path(path)
        self._digest = digest

    def load(self) -> Optional[dict]:
        """Return the last state of this request, or None; UserError if a file is unreadable."""
        state = None
        if is_main_process() and self._path is not None:
            state = self._find()
        return from_first_rank(state)

    def _find(self) -> Optional[dict]:
        """Look for the state of this request, which then is that of the file."""
        for path in (self._path, *self._others()):
            state = read_checkpoint(str(path)) if path.exists() else {}
            if state.get('digest') == self._digest:
                break
        else:
            path, state = self._path, None
        if self._path.exists() and (state is None or path != self._path):
            names = (f'{self._path.stem}-other-{number}{self._path.suffix}'
                     for number in itertools.count(1))
            kept = next(item for item in map(self._path.with_name, names) if not item.exists())
            warnings.warn(f'{self._path} is of another request, or of other weights: it is kept '
                          f'as {kept.name}, from which that request goes on', stacklevel=4)
            os.replace(str(self._path), str(kept))
        if path != self._path:
            os.replace(str(path), str(self._path))
        return state

    def _others(self) -> List[Path]:
        """List the files with the states of other requests."""
        return sorted(self._path.parent.glob(
            f'{glob.escape(self._path.stem)}-other-*{self._path.suffix}'))

    def save(self, **state) -> None:
        """Replace the last state by a new one; the folder is made if it does not exist."""
        if self._path is not None and is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (temporary, ):
                save_checkpoint(dict(state, digest=self._digest), temporary)
