# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Finding modules by name, with errors that suggest what may have been meant; what heads say."""
import difflib
from typing import Optional

import torch.nn as nn

from mmgcp.errors import UserError


def find_module(model: nn.Module, name: str, owner: str = 'model') -> nn.Module:
    """Return the module of a name; if there is none, raise a UserError with the closest names.

    The error calls the model ``owner``.
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


def number_of_classes(model: nn.Module) -> Optional[int]:
    """The number of classes that a detector distinguishes, without the background.

    None if its head does not say: of two stages the last head, of a cascade the first of these.
    """
    head = getattr(getattr(model, 'roi_head', model), 'bbox_head', None)
    head = head[0] if isinstance(head, nn.ModuleList) else head
    number = getattr(getattr(head, 'head_module', head), 'num_classes', None)
    return getattr(head, 'num_classes', number)
