# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Finding modules by name, with errors that suggest what may have been meant."""
import difflib

import torch.nn as nn

from mmgcp.errors import UserError


def find_module(model: nn.Module, name: str, owner: str = 'model') -> nn.Module:
    """Find a module by its name.

    Args:
        model (nn.Module): The model to search.
        name (str): Name as in ``model.named_modules()``.
        owner (str): What to call the model in an error. Defaults to 'model'.

    Returns:
        nn.Module: The module.

    Raises:
        UserError: There is none; the message lists the closest names.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise UserError(f'the {owner} has no module {name!r}{_closest_names(model, name)}')
    return modules[name]


def _closest_names(model: nn.Module, wanted: str) -> str:
    """End an error message with similar names or, if there are none, the names of the parts."""
    names = [name for name, _ in model.named_modules() if name]
    closest = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if closest:
        return f'; the closest names are {", ".join(map(repr, closest))}'
    children = ', '.join(repr(name) for name, _ in model.named_children())
    return f'; it consists of {children}' if children else '; it has no modules at all'
