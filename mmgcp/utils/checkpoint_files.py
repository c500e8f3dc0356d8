# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing checkpoints, and finding the one from which an interrupted training resumes."""
import io
import os
from pathlib import Path
from typing import List, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError

from .checkpoint import read_checkpoint

MARKER = 'last_checkpoint'  # MMEngine's file with the path of the last one


def training_bytes(model: nn.Module) -> int:
    """Return how large a checkpoint of a training is at least: weights, and an optimizer's state.

    Args:
        model (nn.Module): The detector that is trained.

    Returns:
        int: Bytes of the weights, and as many for the momentum of those that are trained.
    """
    tensors = [*model.state_dict().values(),
               *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors
               if isinstance(tensor, Tensor))


def save_checkpoint(content: dict, path: Union[str, Path]) -> None:
    """Write a checkpoint; an error of the file system is an OSError and not one of torch.

    Args:
        content (dict): Anything that ``torch.save`` takes.
        path (str | Path): The file.

    Raises:
        OSError: It cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with open(str(path), 'wb') as file:
        file.write(buffer.getbuffer())


def newest_checkpoint(folder: Union[str, Path], since: int = 0) -> Optional[str]:
    """Find the newest checkpoint of a training that is whole.

    It is looked for among ``epoch_*.pth`` and ``iter_*.pth`` and what ``last_checkpoint`` names.
    MMEngine trusts the latter, which may name a file that was deleted before the training was
    killed, or be older than a file that was not written to its end.

    Args:
        folder (str | Path): The ``work_dir`` of the training.
        since (int): Older files do not count, in nanoseconds as ``st_mtime_ns``. Defaults to 0.

    Returns:
        str, optional: Its path; None if there is no checkpoint, whole or not, perhaps because
        the only one was deleted for the next one.

    Raises:
        UserError: There are checkpoints, but none that is whole.
    """
    folder = Path(folder)
    marker = folder / MARKER
    found = [path for pattern in ('epoch_*.pth', 'iter_*.pth') for path in folder.glob(pattern)]
    named = marker.read_text(errors='replace').strip() if marker.is_file() else ''
    if named and os.path.isfile(named) and not any(os.path.samefile(named, str(path))
                                                   for path in found):
        found.append(Path(named))
    found = [path for path in found if path.stat().st_mtime_ns >= since]
    broken: List[str] = []
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        reason = _broken(path)
        if reason is None:
            if broken:
                print(f'{path} is the newest checkpoint that is whole: {"; ".join(broken)}')
            return str(path)
        broken.append(reason)
    if named and not broken and not os.path.isfile(named):
        print(f'{named}, which {marker} names, does not exist')
    if broken:
        raise UserError(f'no checkpoint in {folder} is whole: {"; ".join(broken)}')
    return None


def _broken(path: Path) -> Optional[str]:
    """Say why a training cannot be resumed from a checkpoint; None if it can."""
    try:
        content = read_checkpoint(str(path))
    except UserError as error:
        return str(error)
    missing = [name for name in ('state_dict', 'optimizer', 'message_hub', 'meta')
               if name not in content]
    return f'{path} has no {missing[0]}' if missing else None
