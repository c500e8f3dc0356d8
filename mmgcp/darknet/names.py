# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Names of the classes, which Darknet keeps in a file with one name per line."""
from pathlib import Path
from typing import Any, Optional, Tuple, Union

from mmdet.evaluation import get_classes

from .cfg import DarknetError, shorten
from .files import read_text

_DATASETS = {80: 'coco', 20: 'voc'}


def read_names(path: Union[str, Path]) -> Tuple[str, ...]:
    """Read a names file in UTF-8; empty lines are ignored. DarknetError if that is not possible."""
    lines = read_text(path, 'names file').splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    return check_names(names, str(path))


def check_names(names: Any, owner: str) -> Tuple[str, ...]:
    """Check that class names can be written to a names file and to a config, one by one.

    Args:
        names (Any): The names.
        owner (str): What has them, for the error message.

    Returns:
        tuple[str, ...]: The names.

    Raises:
        DarknetError: They are no list of texts, or a text is not one line without spaces around
            it, or cannot be encoded, or has ``{{``, which MMEngine replaces in configs.
    """
    if not isinstance(names, (list, tuple)):
        raise DarknetError(f'the class names of {owner} must be a list, but are '
                           f'{shorten(repr(names))}')
    for name in names:
        if not isinstance(name, str) or name.splitlines() != [name] or name.strip() != name:
            raise DarknetError(f'{owner} has the class name {shorten(repr(name))}, but it must be '
                               'a text on one line, without spaces around it')
        if '{{' in name or '\0' in name or any('\ud800' <= char <= '\udfff' for char in name):
            raise DarknetError(f'{owner} has the class name {shorten(repr(name))}, which cannot be '
                               'written to a file')
    return tuple(names)


def class_names(num_classes: int, path: Optional[Union[str, Path]] = None) -> Tuple[str, ...]:
    """Return the names of the classes.

    Args:
        num_classes (int): Number of classes of the network.
        path (str | Path, optional): A names file. Defaults to None: 80 classes are taken to
            be COCO's and 20 to be VOC's, and others are called 'class_0' and so on.

    Returns:
        tuple[str, ...]: The names.

    Raises:
        DarknetError: The names file has another number of names, or cannot be read.
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
