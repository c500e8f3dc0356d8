# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing a config as a person would."""
import copy
from typing import Dict, List, Optional, Tuple

from mmengine.config import Config


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


def prefer(options: Dict[str, object], settings: Dict[str, object]) -> Dict[str, object]:
    """Join settings by dotted key with options that come first.

    Args:
        options (dict): Values by dotted key.
        settings (dict): Others; what the options set as a part of these must be in them.

    Returns:
        dict: Both, without what would be set inside of another value.
    """
    kept = {key: value for key, value in settings.items() if not _inside(key, options)}
    added = {key: value for key, value in options.items() if not _inside(key, settings)}
    return {**kept, **added}


def _inside(key: str, others: Dict[str, object]) -> bool:
    return any(key.startswith(f'{other}.') for other in others)


def nest(base: Config, changes: Dict[str, object]) -> Dict[str, object]:
    """Nest values by dotted key as a config writes them that has ``base`` as its base.

    Args:
        base (Config): The base, read.
        changes (dict): Values by dotted key; numbers in the keys stand for elements of lists,
            as in ``{'custom_hooks.1.switch_epoch': 40}``.

    Returns:
        dict: Nested settings. Lists are said anew, with ``_base_`` for what they keep.
    """
    content = base.to_dict()
    settings, lists = {}, {}
    for key, value in changes.items():
        place = _find_list(content, key)
        if place is None:
            settings = merge(settings, {key: value})
        else:
            name, index, rest = place
            lists.setdefault(name, {}).setdefault(index, {})[rest] = value
    for name, items in lists.items():
        settings = merge(settings, {name: _changed_list(_get(content, name), name, items)})
    return settings


def _changed_list(elements: list, name: str,
                  items: Dict[int, Dict[str, object]]) -> List[object]:
    """Code for the elements of a list of the base, some of which have changes."""
    return [_changed_element(f'_base_.{name}[{index}]', element, items.get(index, {}))
            for index, element in enumerate(elements)]


def _changed_element(code: str, element: object, changes: Dict[str, object]) -> object:
    if '' in changes:
        return changes['']
    if not changes:
        return Code(code)
    changed = Config(dict(element=copy.deepcopy(element)))
    changed.merge_from_dict({f'element.{key}': value for key, value in changes.items()})
    names = dict.fromkeys(key.split('.')[0] for key in changes)
    values = changed.to_dict()['element']
    settings = ', '.join(f'{name}={_render_value(values[name], 2)}' for name in names)
    return Code(f'dict({code}, {settings})')


def _find_list(content: dict, key: str) -> Optional[Tuple[str, int, str]]:
    """The list that a dotted key goes through, the number of the element, and the rest."""
    parts = key.split('.')
    for number, part in enumerate(parts):
        if isinstance(content, (list, tuple)):
            return '.'.join(parts[:number]), int(part), '.'.join(parts[number + 1:])
        if not isinstance(content, dict) or part not in content:
            return None
        content = content[part]
    return None


def _get(content: dict, key: str) -> object:
    for part in key.split('.'):
        content = content[part]
    return content


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
    if isinstance(value, list) and any(isinstance(item, (dict, Code)) for item in value):
        return _block('[', [_render_value(item, indent + 1) for item in value], ']', indent)
    if isinstance(value, dict) and all(str(key).isidentifier() for key in value):
        items = [f'{key}={_render_value(item, indent + 1)}' for key, item in value.items()]
        line = f'dict({", ".join(items)})'
        return line if len(line) < 80 and '\n' not in line else _block('dict(', items, ')', indent)
    return repr(value)


def _block(opening: str, items: list, closing: str, indent: int) -> str:
    space = '    ' * (indent + 1)
    return f'{opening}\n{space}' + f',\n{space}'.join(items) + closing
