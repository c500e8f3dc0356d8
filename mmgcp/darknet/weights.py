# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Darknet's weights files: a header, followed by the parameters as little-endian float32."""
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Dict, Iterable, Sequence, Tuple, Union

import numpy as np

from .cfg import DarknetError
from .layers import BN_EPS

Shapes = Dict[str, Tuple[int, ...]]
MAX_VERSION = 1000  # Darknet takes higher ones to mean that weights are transposed


@dataclass
class Header:
    """Header of a weights file.

    Args:
        major (int): Major version of the format. Defaults to 0.
        minor (int): Minor version of the format. Defaults to 2.
        revision (int): Revision of the format. Defaults to 5.
        seen (int): Number of images seen in training. Defaults to 0.
    """

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0

    @property
    def seen_format(self) -> str:
        """str: Format of the number of images, which has 64 bits since version 0.2."""
        return '<q' if self.major * 10 + self.minor >= 2 else '<i'


def read_weights(path: Union[str, Path],
                 layers: Sequence[Tuple[str, Shapes]]) -> Tuple[Header, Dict[str, np.ndarray]]:
    """Read a weights file, which may end after any layer.

    Args:
        path (str | Path): The file.
        layers (Sequence[tuple[str, dict]]): For each convolution, what to call it in
            error messages and the names and shapes of its parameters, in Darknet's order.

    Returns:
        tuple[Header, dict[str, np.ndarray]]: The header and the parameters by name.

    Raises:
        DarknetError: The file ends inside a layer, has no layer, or continues after the last, or
            a layer has values with which outputs would not be finite.
    """
    left = Path(path).stat().st_size
    arrays: Dict[str, np.ndarray] = {}
    with open(path, 'rb') as file:
        header = _read_header(file, path)
        left -= file.tell()
        for name, shapes in layers:
            if left == 0:
                break
            needed = 4 * sum(math.prod(shape) for shape in shapes.values())
            if needed > left:
                raise DarknetError(f'{path} ends inside {name}: the layer needs {needed} bytes, '
                                   f'but {left} are left')
            for key, shape in shapes.items():
                arrays[key] = _read_array(file, shape)
                _check_values(arrays[key], f'{path}: {name}', key)
            left -= needed
    if left:
        raise DarknetError(f'{path} has {left} bytes left over after the last layer, {name}')
    if not arrays:
        raise DarknetError(f'{path} holds no layer')
    return header, arrays


def _read_header(file: BinaryIO, path: Union[str, Path]) -> Header:
    try:
        header = Header(*struct.unpack('<3i', file.read(12)))
        size = struct.calcsize(header.seen_format)
        header.seen, = struct.unpack(header.seen_format, file.read(size))
    except struct.error:
        raise DarknetError(f'{path} ends inside its header') from None
    if not all(0 <= part <= MAX_VERSION for part in (header.major, header.minor)):
        raise DarknetError(f'{path} is no Darknet weights file: its header has the version '
                           f'{header.major}.{header.minor}')
    if header.seen < 0:
        raise DarknetError(f'{path} is no Darknet weights file: its header counts {header.seen} '
                           'images')
    return header


def _check_values(values: np.ndarray, where: str, key: str) -> None:
    """Raise a DarknetError if values of a layer would make its outputs NaN or infinite."""
    name = key.rpartition('.')[2]
    if not np.isfinite(values).all():
        raise DarknetError(f'{where} has values of its {name} that are not finite')
    if name == 'running_var' and float(values.min()) + BN_EPS <= 0:
        raise DarknetError(f'{where} has a variance of {float(values.min()):g}, with which outputs '
                           'are not finite')


def _read_array(file: BinaryIO, shape: Tuple[int, ...]) -> np.ndarray:
    data = file.read(4 * math.prod(shape))
    return np.frombuffer(data, '<f4').reshape(shape).astype(np.float32)


def write_weights(path: Union[str, Path], header: Header, arrays: Iterable[np.ndarray]) -> None:
    """Write a weights file.

    Args:
        path (str | Path): The file.
        header (Header): Its header.
        arrays (Iterable[np.ndarray]): The parameters in Darknet's order.
    """
    with open(path, 'wb') as file:
        file.write(struct.pack('<3i', header.major, header.minor, header.revision))
        file.write(struct.pack(header.seen_format, header.seen))
        for array in arrays:
            file.write(np.ascontiguousarray(array, '<f4').tobytes())
