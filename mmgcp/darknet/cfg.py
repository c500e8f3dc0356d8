# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Darknet's cfg files: a list of sections with options, as in an INI file."""
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

from mmgcp.errors import DarknetError

from .files import read_text

Bounds = Optional[Tuple[float, float]]  # the lowest and the highest allowed number
# The deepest YOLOv4 that is read has about 500 sections
MAX_SECTIONS = 2000
MAX_DIGITS = 40
WHOLE_NUMBER = re.compile(r'[+-]?[0-9]+')


def first_line(error: Exception) -> str:
    """Return the first line of an error, to quote it in the message of another one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass
class Section:
    """A section of a cfg file.

    Args:
        name (str): Name between the brackets, such as 'convolutional'.
        options (dict[str, str]): The options as they are written, in order.
        line (int): Line in the file, 0 if there is no file. Defaults to 0.
    """

    name: str
    options: Dict[str, str] = field(default_factory=dict)
    line: int = 0

    def __str__(self) -> str:
        name = f'[{shorten(self.name)}]'
        return f'{name} in line {self.line}' if self.line else name

    def ints(self, key: str, default: str = '', bounds: Bounds = None) -> List[int]:
        """Return an option as a list of whole numbers, which must be within bounds."""
        return self._numbers(key, default, _whole_number, 'whole numbers', bounds)

    def floats(self, key: str, default: str = '', bounds: Bounds = None) -> List[float]:
        """Return an option as a list of finite numbers, which must be within bounds."""
        return self._numbers(key, default, _finite_number, 'numbers', bounds)

    def integer(self, key: str, default: str = '', bounds: Bounds = None) -> int:
        """Return an option as a single whole number, which must be within bounds."""
        return int(self._single(key, self.ints(key, default, bounds)))

    def number(self, key: str, default: str = '', bounds: Bounds = None) -> float:
        """Return an option as a single finite number, which must be within bounds."""
        return float(self._single(key, self.floats(key, default, bounds)))

    def _single(self, key: str, numbers: list):
        if len(numbers) != 1:
            text = shorten(self.options[key])
            raise DarknetError(f'{self}: {key} must be one number, but is {text!r}')
        return numbers[0]

    def _numbers(self, key: str, default: str, read: type, what: str, bounds: Bounds) -> list:
        text = self.options.get(key, default)
        if not text:
            raise DarknetError(f'{self} has no option {key!r}')
        try:
            numbers = [read(item) for item in text.strip(',').split(',')]
        except ValueError:
            raise DarknetError(f'{self}: {key}={shorten(text)} must be {what}') from None
        if bounds is not None and not all(bounds[0] <= number <= bounds[1] for number in numbers):
            raise DarknetError(f'{self}: {key}={shorten(text)} must be from {bounds[0]} to '
                               f'{bounds[1]}')
        return numbers


def shorten(text: str) -> str:
    """Return the beginning of a text of a file, to quote it in a message."""
    return text if len(text) <= 60 else f'{text[:60]}...'


def _whole_number(text: str) -> int:
    """Read a whole number of as many digits as one may have; ValueError if it is none."""
    if not WHOLE_NUMBER.fullmatch(text) or len(text) > MAX_DIGITS:
        raise ValueError
    return int(text)


def _finite_number(text: str) -> float:
    """Read a finite number; ValueError if it is none."""
    number = float(text)
    if not math.isfinite(number) or '_' in text:
        raise ValueError
    return number


def parse_cfg(text: str, name: str = 'cfg') -> List[Section]:
    """Parse the text of a cfg file.

    As in Darknet, white space and lines that begin with ``#`` or ``;`` are ignored.

    Args:
        text (str): Content of the file.
        name (str): What to call the file in error messages. Defaults to 'cfg'.

    Returns:
        list[Section]: The sections, beginning with that of the network (``[net]``).

    Raises:
        DarknetError: A line is neither a section nor an option, or there are too many.
    """
    sections: List[Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = ''.join(line.split())
        if not line or line[0] in '#;':
            continue
        if line[0] == '[' and line[-1] == ']':
            sections.append(Section(line[1:-1], line=number))
            if len(sections) > MAX_SECTIONS:
                raise DarknetError(f'{name} has more than {MAX_SECTIONS} sections')
        elif '=' in line and sections:
            key, value = line.split('=', 1)
            sections[-1].options[key] = value
        else:
            raise DarknetError(f'{name} is not a Darknet cfg: line {number} is {line[:60]!r}')
    if not sections or sections[0].name not in ('net', 'network'):
        raise DarknetError(f'{name} is not a Darknet cfg: it does not begin with a section [net]')
    return sections


def read_cfg(path: Union[str, Path]) -> List[Section]:
    """Read a cfg file, of which comments may have any encoding; see :func:`parse_cfg`."""
    return parse_cfg(read_text(path, 'Darknet cfg', errors='replace'), str(path))


def format_cfg(sections: Sequence[Section]) -> str:
    """Return the text of a cfg file with these sections."""
    return '\n'.join(
        f'[{section.name}]\n' + ''.join(f'{key}={value}\n' for key, value in
                                        section.options.items())
        for section in sections)
