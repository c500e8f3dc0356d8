# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing a config as a person would."""
from typing import Dict


class Code(str):
    """A value that is written as it is, not as a string."""


def merge(settings: Dict[str, object], options: Dict[str, object]) -> Dict[str, object]:
    """Add settings given by dotted keys to nested ones.

    Args:
        settings (dict): Nested settings; not changed.
        options (dict): Values by dotted key, as ``{'model.neck.depth': 3}``.

    Returns:
        dict: Both, the options where they meet.
    """
    merged = {key: merge(value, {}) if isinstance(value, dict) else value
              for key, value in settings.items()}
    for key, value in options.items():
        name, _, rest = key.partition('.')
        if rest:
            inner = merged.get(name)
            merged[name] = merge(inner if isinstance(inner, dict) else {}, {rest: value})
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def render(settings: Dict[str, object]) -> str:
    """Write nested settings as the text of a Python config.

    Args:
        settings (dict): The values by name; see :class:`Code`.

    Returns:
        str: An assignment for each name.
    """
    return ''.join(f'{name} = {_render_value(value, 0)}\n' for name, value in settings.items())


def _render_value(value: object, indent: int) -> str:
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return _block('[', [_render_value(item, indent + 1) for item in value], ']', indent)
    if isinstance(value, dict) and all(str(key).isidentifier() for key in value):
        items = [f'{key}={_render_value(item, indent + 1)}' for key, item in value.items()]
        line = f'dict({", ".join(items)})'
        return line if len(line) < 80 and '\n' not in line else _block('dict(', items, ')', indent)
    return repr(value)


def _block(opening: str, items: list, closing: str, indent: int) -> str:
    space = '    ' * (indent + 1)
    return f'{opening}\n{space}' + f',\n{space}'.join(items) + closing
