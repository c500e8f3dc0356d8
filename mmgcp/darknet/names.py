# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Names of the classes, which Darknet keeps in a file with one name per line."""
from pathlib import Path
from typing import Optional, Tuple, Union

from mmdet.evaluation import get_classes

from .cfg import DarknetError

_DATASETS = {80: 'coco', 20: 'voc'}


def read_names(path: Union[str, Path]) -> Tuple[str, ...]:
    """Read a names file; empty lines are ignored."""
    lines = Path(path).read_text(encoding='utf-8', errors='replace').splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def class_names(num_classes: int, path: Optional[Union[str, Path]] = None) -> Tuple[str, ...]:
    """Return the names of the classes.

    Args:
        num_classes (int): Number of classes of the network.
        path (str | Path, optional): A names file. Defaults to None: 80 classes are taken to
            be COCO's and 20 to be VOC's, and others are called 'class_0' and so on.

    Returns:
        tuple[str, ...]: The names.

    Raises:
        DarknetError: The names file has another number of names.
    """
    if path is not None:
        names = read_names(path)
        if len(names) != num_classes:
            raise DarknetError(f'{path} has {len(names)} names, but the network has '
                               f'{num_classes} classes')
        return names
    if num_classes in _DATASETS:
        return tuple(get_classes(_DATASETS[num_classes]))
    return tuple(f'class_{i}' for i in range(num_classes))
