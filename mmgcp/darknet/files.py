# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the converters check before they begin."""
from pathlib import Path
from typing import Union

from .cfg import DarknetError


def check_file(path: Union[str, Path], what: str):
    """Raise a DarknetError if a file to be read does not exist."""
    if not Path(path).is_file():
        raise DarknetError(f'the {what} {path} does not exist')


def check_folder(path: Union[str, Path]):
    """Raise a DarknetError if the folder of a file to be written does not exist."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise DarknetError(f'the output folder {folder} does not exist')
