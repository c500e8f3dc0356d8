# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Darknet's cfg files: a list of sections with options, as in an INI file."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Sequence, Union

from mmgcp.errors import DarknetError


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
        return f'[{self.name}] in line {self.line}' if self.line else f'[{self.name}]'

    def ints(self, key: str, default: str = '') -> List[int]:
        """Return an option as a list of whole numbers."""
        return self._numbers(key, default, int, 'whole numbers')

    def floats(self, key: str, default: str = '') -> List[float]:
        """Return an option as a list of numbers."""
        return self._numbers(key, default, float, 'numbers')

    def integer(self, key: str, default: str = '') -> int:
        """Return an option as a single whole number."""
        return int(self._single(key, self.ints(key, default)))

    def number(self, key: str, default: str = '') -> float:
        """Return an option as a single number."""
        return float(self._single(key, self.floats(key, default)))

    def _single(self, key: str, numbers: list):
        if len(numbers) != 1:
            raise DarknetError(f'{self}: {key} must be one number, but is {self.options[key]!r}')
        return numbers[0]

    def _numbers(self, key: str, default: str, number_type: type, what: str) -> list:
        text = self.options.get(key, default)
        if not text:
            raise DarknetError(f'{self} has no option {key!r}')
        try:
            return [number_type(item) for item in text.strip(',').split(',')]
        except ValueError:
            raise DarknetError(f'{self}: {key}={text} must be {what}') from None


def parse_cfg(text: str, name: str = 'cfg') -> List[Section]:
    """Parse the text of a cfg file.

    As in Darknet, white space and lines that begin with ``#`` or ``;`` are ignored.

    Args:
        text (str): Content of the file.
        name (str): What to call the file in error messages. Defaults to 'cfg'.

    Returns:
        list[Section]: The sections, beginning with that of the network (``[net]``).

    Raises:
        DarknetError: A line is neither a section nor an option.
    """
    sections: List[Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = ''.join(line.split())
        if not line or line[0] in '#;':
            continue
        if line[0] == '[' and line[-1] == ']':
            sections.append(Section(line[1:-1], line=number))
        elif '=' in line and sections:
            key, value = line.split('=', 1)
            sections[-1].options[key] = value
        else:
            raise DarknetError(f'{name} is not a Darknet cfg: line {number} is {line[:60]!r}')
    if not sections or sections[0].name not in ('net', 'network'):
        raise DarknetError(f'{name} is not a Darknet cfg: it does not begin with a section [net]')
    return sections


def read_cfg(path: Union[str, Path]) -> List[Section]:
    """Read a cfg file; see :func:`parse_cfg`."""
    text = Path(path).read_text(encoding='utf-8', errors='replace')
    return parse_cfg(text, str(path))


def format_cfg(sections: Sequence[Section]) -> str:
    """Return the text of a cfg file with these sections."""
    return '\n'.join(
        f'[{section.name}]\n' + ''.join(f'{key}={value}\n' for key, value in
                                        section.options.items())
        for section in sections)
