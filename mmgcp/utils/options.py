# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Options as the fields of a dataclass, which know their help, their check and their switch.

What Python functions, configs, command lines and documentation say of an option follows from
its field, so that each option is described once.
"""
import argparse
import textwrap
from dataclasses import MISSING, Field, field, fields
from typing import Any, Dict, Iterable, List, Optional, Type

from mmgcp.errors import UserError

from .checks import Check, check_keys, check_value


def option(default: Any = MISSING, *, help: str, check: Optional[Check] = None,
           factory: Any = MISSING, cli: Optional[dict] = None, **notes: Any) -> Any:
    """Declare an option: a field of a dataclass.

    Args:
        default (Any): Its default; options without one have to be given.
        help (str): One sentence or two, without the default.
        check (Check, optional): What values have to satisfy; see :func:`check_options`. None as
            a value is not checked if it is the default.
        factory (Callable, optional): Makes the default instead.
        cli (dict, optional): Arguments for ``ArgumentParser.add_argument``, ``group`` for the
            title of its group; options without it are not on the command line.
        **notes: Whatever else the owner of the option wants to know of it.

    Returns:
        Field: The field.
    """
    return field(default=default, default_factory=factory,
                 metadata=dict(notes, help=help, check=check, cli=cli))


def check_options(options: Any, error: Type[UserError] = UserError) -> None:
    """Check the values of all options.

    Args:
        options (object): An instance of the dataclass.
        error (type): What to raise. Defaults to UserError.

    Raises:
        UserError: A value is not allowed; names the option, the value and what is allowed.
    """
    for item in fields(options):
        value, check = getattr(options, item.name), item.metadata['check']
        if check is None or (value is None and item.default is None):
            continue
        check_value(item.name, value, check, error)


def check_of(cls: type, name: str) -> Optional[Check]:
    """Return what values of an option have to satisfy, for one that is set somewhere else."""
    return {item.name: item.metadata['check'] for item in fields(cls)}[name]


def check_names(cls: type, names: Iterable[str], owner: str,
                error: Type[UserError] = UserError) -> None:
    """Raise an error if a dataclass of options has none of a name.

    Args:
        cls (type): The dataclass.
        names (Iterable[str]): The names.
        owner (str): Who has these options, for the message.
        error (type): What to raise. Defaults to UserError.
    """
    check_keys(names, [item.name for item in fields(cls)], owner, error)


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give a command line the options that have a switch; all are None if they are not given.

    Args:
        parser (argparse.ArgumentParser): Gets the arguments, in groups.
        cls (type): The dataclass.
    """
    parser.formatter_class = WholeOptions
    groups: Dict[str, Any] = {}
    for item in _on_command_line(cls):
        settings = dict(item.metadata['cli'])
        title = settings.pop('group', None)
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = item.metadata['help']
        if callable(settings.get('choices')):  # known only by now, and too many for the usage
            settings['choices'] = settings['choices']()
            text += f': {", ".join(settings["choices"])}'
        text = _with_default(text, item)
        groups.get(title, parser).add_argument(
            f'--{item.name.replace("_", "-")}', default=None,
            help=text.replace('%', '%%'), **settings)


def given_options(args: argparse.Namespace, cls: type) -> Dict[str, Any]:
    """Return the options that a command line sets.

    Args:
        args (argparse.Namespace): What the parser of :func:`add_arguments` found.
        cls (type): The dataclass.

    Returns:
        dict[str, Any]: Their values by name.
    """
    found = {item.name: getattr(args, item.name) for item in _on_command_line(cls)}
    return {name: value for name, value in found.items() if value is not None}


def options_table(cls: type) -> str:
    """Describe all options in a table in Markdown."""
    lines = ['| option | default | command line | |', '|---|---|---|---|']
    for item in fields(cls):
        switch = f'`--{item.name.replace("_", "-")}`' if item.metadata['cli'] else ''
        text = item.metadata['help'].replace('|', '\\|')
        lines.append(f'| `{item.name}` | {_default_of(item)} | {switch} | {text} |')
    return '\n'.join(lines)


def _on_command_line(cls: type) -> List[Field]:
    return [item for item in fields(cls) if item.metadata['cli'] is not None]


def _with_default(text: str, item: Field) -> str:
    shown = item.metadata.get('default_help')
    if shown is None and item.default not in (None, MISSING, False):
        shown = str(item.default)
    return text if shown is None else f'{text.rstrip(".")}; default: {shown}'


class WholeOptions(argparse.HelpFormatter):
    """Help that is not wrapped behind hyphens, so that options in it can be copied."""

    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(' '.join(text.split()), width, break_on_hyphens=False)


def _default_of(item: Field) -> str:
    shown = item.metadata.get('default_help')
    if shown is not None:
        return shown
    if item.default is MISSING:
        return 'none' if item.default_factory is MISSING else f'`{item.default_factory()!r}`'
    return f'`{item.default!r}`'
