# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reading JSON that may come from anyone."""
import json
from pathlib import Path
from typing import Any, Type, Union

from mmgcp.errors import UserError

MAX_BYTES = 64 * 2**20
MAX_DIGITS = 40
MAX_DEPTH = 50


def read_text(path: Union[str, Path], what: str, error: Type[UserError] = UserError) -> str:
    """Read a text file in UTF-8.

    Args:
        path (str | Path): The file.
        what (str): What to call it in messages, such as 'the plan'.
        error (type): What to raise. Defaults to UserError.

    Returns:
        str: Its text.

    Raises:
        UserError: It cannot be read, is no text, or is larger than 64 MiB.
    """
    try:
        with open(str(path), 'rb') as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise error(f'{what} {path} is larger than {MAX_BYTES >> 20} MiB')
        return content.decode('utf-8-sig')
    except OSError as reason:
        raise error(f'{what} {path} cannot be read: {reason.strerror}') from None
    except UnicodeDecodeError:
        raise error(f'{what} {path} is not JSON: it is no text in UTF-8') from None
    except ValueError as reason:
        if isinstance(reason, error):
            raise
        raise error(f'{what} {str(path)!r} cannot be read: {reason}') from None  # NUL in the path


def parse_json(text: str, what: str, error: Type[UserError] = UserError) -> Any:
    """Parse JSON that is nested up to 50 times and has whole numbers of up to 40 digits.

    Args:
        text (str): The text.
        what (str): What to call it in messages, such as 'the plan plan.json'.
        error (type): What to raise. Defaults to UserError.

    Returns:
        Any: What the text stands for.

    Raises:
        UserError: The text is not JSON, is nested deeper, has a longer number, or a text that
            cannot be written to files.
    """
    try:
        found = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise error(f'{what} is nested too deep') from None
    except ValueError as reason:
        raise error(f'{what} is not JSON: {reason}') from None
    problem = _find_problem(found)
    if problem:
        raise error(f'{what} {problem}')
    return found


def shorten(value: Any) -> str:
    """Return the beginning of how Python writes a value, to quote it in a message."""
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:100]}...'


def _find_problem(content: Any) -> str:
    """Return why values could not be processed or written later, empty if they can."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return 'is nested too deep'
        inner: list = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    return f'has a text that is not Unicode: {shorten(value)}'
        level = inner
    return ''


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f'it has a number of {len(text)} digits')
    return int(text)
