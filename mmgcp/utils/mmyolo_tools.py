# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""MMYOLO's own command-line tools, which those of mmgcp extend."""
import importlib.util
from pathlib import Path
from types import ModuleType

import mmyolo

from mmgcp.errors import UserError

from .cli import CfgOptions


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
    # Installed from a wheel, or from a clone of its repository
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (folder / name).is_file():
            tool = load_script(folder / name)
            vars(tool)['DictAction'] = CfgOptions  # whose errors argparse reports
            return tool
    raise UserError(f'the MMYOLO in {package} comes without its tools ({name})')


def load_script(path: Path) -> ModuleType:
    """Load a script that is not part of a package as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(f'script_{path.stem}', str(path))
    assert spec and spec.loader  # there are, for any file that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
