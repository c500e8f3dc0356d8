# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Find the modules of a model by name, with errors that say what was meant."""
import difflib
import fnmatch
from typing import Dict

import torch.nn as nn

from mmgcp.errors import UserError


def find_module(model: nn.Module, name: str, owner: str = 'model') -> nn.Module:
    """Find the module of that name.

    Args:
        model (nn.Module): Where to look.
        name (str): Name as in ``model.named_modules()``.
        owner (str): What to call the model in an error. Defaults to 'model'.

    Returns:
        nn.Module: The module.

    Raises:
        UserError: There is none; the message has the closest names.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise UserError(f'the {owner} has no module {name!r}{_closest_names(model, name)}')
    return modules[name]


def find_modules(model: nn.Module, pattern: str, owner: str = 'model') -> Dict[str, nn.Module]:
    """Find the modules whose names match a shell pattern such as ``neck.*.conv``.

    Args:
        model (nn.Module): Where to look.
        pattern (str): Pattern of :mod:`fnmatch`; ``*`` matches dots, too.
        owner (str): What to call the model in an error. Defaults to 'model'.

    Returns:
        dict[str, nn.Module]: Modules by name, in the model's order.

    Raises:
        UserError: None matches; the message has the closest names.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name and fnmatch.fnmatchcase(name, pattern)
    }
    if not found:
        raise UserError(f'no module of the {owner} matches {pattern!r}'
                        f'{_closest_names(model, pattern)}')
    return found


def _closest_names(model: nn.Module, wanted: str) -> str:
    """The end of an error message: names like the wanted one, else those to begin with."""
    names = [name for name, _ in model.named_modules() if name]
    closest = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if closest:
        return f'; the closest names are {", ".join(map(repr, closest))}'
    children = ', '.join(repr(name) for name, _ in model.named_children())
    return f'; it consists of {children}' if children else '; it has no modules at all'
