# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Checks of the converters before they start."""
from pathlib import Path
from typing import Union

from .cfg import DarknetError


def check_file(path: Union[str, Path], what: str):
    """Raise a DarknetError if an input file does not exist."""
    if not Path(path).is_file():
        raise DarknetError(f'the {what} {path} does not exist')


def check_folder(path: Union[str, Path]):
    """Raise a DarknetError if the folder of an output file does not exist."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise DarknetError(f'the output folder {folder} does not exist')
