# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Checks of the converters before they start, and texts of limited size."""
from pathlib import Path
from typing import Union

from mmgcp.errors import DarknetError

MAX_TEXT = 2**20  # bytes of a cfg or names file


def check_file(path: Union[str, Path], what: str) -> None:
    """Raise a DarknetError if an input file does not exist."""
    if not Path(path).is_file():
        raise DarknetError(f'the {what} {path} does not exist')


def check_folder(path: Union[str, Path]) -> None:
    """Raise a DarknetError if the folder of an output file does not exist."""
    if '\0' in str(path):
        raise DarknetError(f'the output {str(path)!r} is no name of a file')
    folder = Path(path).parent
    if not folder.is_dir():
        raise DarknetError(f'the output folder {folder} does not exist')


def read_text(path: Union[str, Path], what: str, errors: str = 'strict') -> str:
    """Read a text in UTF-8, with or without a byte-order mark.

    Args:
        path (str | Path): The file.
        what (str): What it should be, for the error message.
        errors (str): What to do with bytes that are not UTF-8. Defaults to 'strict'.

    Returns:
        str: The text.

    Raises:
        DarknetError: The file is larger than 1 MiB, or not in UTF-8.
    """
    with open(path, 'rb') as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise DarknetError(f'{path} is not a {what}: it is larger than {MAX_TEXT} bytes')
    try:
        return content.decode('utf-8-sig', errors)
    except UnicodeDecodeError as error:
        raise DarknetError(f'{path} is not a {what} in UTF-8: byte {error.start} is '
                           f'{content[error.start]:#04x}') from None
