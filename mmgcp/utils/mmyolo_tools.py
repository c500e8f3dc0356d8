# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""MMYOLO's own command-line tools, which those of mmgcp extend."""
import importlib.util
from pathlib import Path
from types import ModuleType

import mmyolo

from mmgcp.errors import UserError


def load_mmyolo_tool(name: str) -> ModuleType:
    """Load one of MMYOLO's tools as a module.

    Args:
        name (str): File name, as ``'train.py'``.

    Returns:
        ModuleType: The tool, with ``parse_args()`` and ``main()``.

    Raises:
        UserError: The installed MMYOLO comes without its tools.
    """
    package = Path(mmyolo.__file__).parent
    # installed from a wheel, or from a clone of its repository
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        path = folder / name
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f'mmyolo_tool_{path.stem}', path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise UserError(f'the MMYOLO in {package} comes without its tools ({name})')
