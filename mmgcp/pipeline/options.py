# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A dataclass of options as the single source of help, checks, command line and docs."""
import argparse
import copy
import dataclasses
import typing
from typing import Callable, Dict, List, Optional

from mmgcp.errors import UserError

Check = Callable[[object], Optional[str]]


def option(default: object, help: str, check: Optional[Check] = None,
           cli: Optional[dict] = None) -> dataclasses.Field:
    """Declare an option as a field of a dataclass.

    Args:
        default (object): Its default value. A default of None, which is not printed, stands for
            something that the help explains.
        help (str): What it does, in a sentence without a full stop.
        check (Callable, optional): Gets the value, unless it is None, and returns what is
            required of it if it is wrong, such as ``'must be positive'``, otherwise None.
        cli (dict, optional): Arguments for argparse's ``add_argument`` in addition to those that
            follow from the field's type, and ``group``, the title of the option's group.

    Returns:
        dataclasses.Field: The field.
    """
    metadata = dict(help=help, check=check, cli=cli or {})
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def positive(value: float) -> Optional[str]:
    """Require a number above zero."""
    return None if value > 0 else 'must be positive'


def check_options(options: object) -> None:
    """Check the values of all options; meant for ``__post_init__``.

    Raises:
        UserError: A value is wrong; says which and why.
    """
    for item in _options(type(options)):
        value, check = getattr(options, item.name), item.metadata['check']
        problem = check(value) if check and value is not None else None
        if problem:
            raise UserError(f'{_flag(item)} {problem}, but is {value}')


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add all options of a dataclass to a parser, as ``--name-of-the-option``."""
    types = typing.get_type_hints(cls)
    groups: Dict[Optional[str], object] = {None: parser}
    for item in _options(cls):
        arguments = dict(item.metadata['cli'])
        title = arguments.pop('group', None)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if types[item.name] is bool:
            arguments.setdefault('action', 'store_const')
            arguments.setdefault('const', True)
        elif 'action' not in arguments:
            arguments.setdefault('type', _inner_type(types[item.name]))
        groups[title].add_argument(
            _flag(item), default=None, help=_help(item).replace('%', '%%'), **arguments)


def given(args: argparse.Namespace, cls: type) -> Dict[str, object]:
    """Return the options of a dataclass that were given on the command line, by name."""
    values = {item.name: getattr(args, item.name) for item in _options(cls)}
    return {name: value for name, value in values.items() if value is not None}


def options_table(cls: type) -> str:
    """Return all options of a dataclass with their help as a table in Markdown."""
    rows = [f'| `{_flag(item)}` | {_help(item)} |' for item in _options(cls)]
    return '\n'.join(['| option | |', '|---|---|', *rows])


def _options(cls: type) -> List[dataclasses.Field]:
    return [item for item in dataclasses.fields(cls) if 'help' in item.metadata]


def _flag(item: dataclasses.Field) -> str:
    return f'--{item.name.replace("_", "-")}'


def _help(item: dataclasses.Field) -> str:
    has_default = item.default not in (None, False, '', dataclasses.MISSING)
    return item.metadata['help'] + (f'; default: {item.default}' if has_default else '')


def _inner_type(hint: object) -> type:
    """``int`` for ``Optional[int]``."""
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return inner[0] if inner else hint
