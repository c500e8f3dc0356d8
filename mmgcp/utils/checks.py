# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What values may be: the one mechanism by which all that users set is checked where it is set.

A :class:`Check` says what a value has to be, in code and in words. Constructors and functions
declare those of their arguments with :func:`checked`, dataclasses of options have them in their
fields (:mod:`mmgcp.utils.options`), and what is nested in a value is checked by
:func:`check_value` and :func:`check_keys`. All errors name the setting, its value and what is
allowed.
"""
import difflib
import functools
import inspect
import math
import numbers
import sys
from collections.abc import Iterable as AnyIterable
from collections.abc import Sequence as AnySequence
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Optional, Sequence, Type

from mmgcp.errors import UserError, shown


class Check(NamedTuple):
    """A test of a value, and what it has to be, as 'must be in [0, 1]'."""
    test: Callable[[Any], bool]
    text: str

    def passes(self, value: Any) -> bool:
        """Whether a value is allowed; one of a kind that the test cannot handle is not."""
        try:
            return bool(self.test(value))
        except Exception:  # comparing with objects of any class can raise anything
            return False


def number_in(low: float, high: float = math.inf, text: Optional[str] = None,
              integer: bool = False, open_low: bool = False, open_high: bool = False) -> Check:
    """Allow finite numbers between bounds, which are allowed themselves unless they are open.

    Without a text it says the bounds. Booleans are no numbers.
    """
    kind: Any = numbers.Integral if integer else numbers.Real

    def test(value: Any) -> bool:
        return (isinstance(value, kind) and not isinstance(value, bool)
                and -sys.float_info.max <= value <= sys.float_info.max
                and (low < value if open_low else low <= value)
                and (value < high if open_high else value <= high))

    return Check(test, text or _bounds(low, high, integer, open_low, open_high))


def _bounds(low: float, high: float, integer: bool, open_low: bool, open_high: bool) -> str:
    if integer:
        return (f'must be an integer of at least {low}' if high == math.inf else
                f'must be an integer from {low} to {high}')
    if high == math.inf:
        return f'must be a finite number {"above" if open_low else "of at least"} {low:g}'
    return f'must be a number in {"(["[not open_low]}{low:g}, {high:g}{")]"[not open_high]}'


def one_of(*values: Any) -> Check:
    """Allow some values, compared with their types."""
    def test(value: Any) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in values)

    return Check(test, f'must be one of {list(values)}')


def instance_of(*kinds: type, text: str) -> Check:
    """Allow objects of some classes."""
    return Check(lambda value: isinstance(value, kinds), text)


def list_of(check: Check, text: str, length: Optional[int] = None, empty: bool = False) -> Check:
    """Allow lists and tuples of values that pass a check, of a length if one is given."""
    def test(value: Any) -> bool:
        return (isinstance(value, AnySequence) and not isinstance(value, (str, bytes))
                and (len(value) == length if length is not None else empty or len(value) > 0)
                and all(map(check.passes, value)))

    return Check(test, text)


def either(*checks: Check, text: str) -> Check:
    """Allow what passes one of several checks."""
    return Check(lambda value: any(check.passes(value) for check in checks), text)


MAX_SIDE = 2**14  # pixels
SHARE = number_in(0, 1)
POSITIVE = number_in(0, open_low=True)
NOT_NEGATIVE = number_in(0)
COUNT = number_in(1, 2**31 - 1, integer=True)
COUNT_OR_NONE = number_in(0, 2**31 - 1, integer=True)
SEED = number_in(0, 2**31 - 1, integer=True)
LOSS_WEIGHT = number_in(0, 1e9)
BOOLEAN = one_of(True, False)
NAME = Check(lambda value: isinstance(value, str) and value.strip() != '' and value.isprintable(),
             'must be a name')
TYPE = either(NAME, instance_of(type, text=''), text='must be the name of a class')
NAMES = list_of(NAME, 'must be a list of names')
PATTERNS = list_of(NAME, 'must be a sequence of patterns')
FACTOR = number_in(0, 64, open_low=True)  # on the width or depth of a network
CHANNELS = number_in(1, 2**16, integer=True)
CHANNEL_LIST = list_of(CHANNELS, 'must be a list of numbers of channels')
PATH = Check(lambda value: isinstance(value, (str, Path)) and '\0' not in str(value)
             and str(value).strip() != '', 'must be a path')
MAPPING = instance_of(dict, text='must be a dict')
CONFIG = Check(lambda value: isinstance(value, dict) and TYPE.passes(value.get('type')),
               'must be a config with a type')
CONFIG_OR_NONE = Check(lambda value: value is None or CONFIG.passes(value),
                       'must be a config with a type, or None')
CONFIGS = list_of(CONFIG, 'must be a list of configs with a type')
FUNCTION = Check(callable, 'must be a function')
ITERABLE = Check(lambda value: isinstance(value, AnyIterable)
                 and not isinstance(value, (str, bytes, dict)), 'must be an iterable of batches')
INPUT_SHAPE = list_of(
    number_in(1, MAX_SIDE, integer=True), 'must be a shape (C, H, W) of an image in pixels, with '
    f'sides from 1 to {MAX_SIDE}', length=3)


def check_value(name: str, value: Any, check: Check, error: Type[UserError] = UserError,
                owner: str = '') -> None:
    """Raise an error that names a setting, its value and what is allowed, unless that passes.

    Args:
        name (str): Name of the setting.
        value (Any): Its value.
        check (Check): What it has to be.
        error (type): What to raise. Defaults to UserError.
        owner (str): Whose setting it is, if the name does not tell. Defaults to ''.
    """
    if not check.passes(value):
        raise error(f'{owner and f"{owner}: "}{name} {check.text}, but is {shown(value)}')


def check_keys(keys: Iterable[Any], known: Sequence[str], owner: str,
               error: Type[UserError] = UserError) -> None:
    """Raise an error if there is an unknown key; it names the closest one that is known."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else (
                f'; there are {", ".join(known)}' if known else '; there are none')
            raise error(f'{owner} has an unknown option {shown(key)}{hint}')


def checked(error: Type[UserError] = UserError, **checks: Check) -> Callable:
    """Let a function or a constructor check its arguments before it runs.

    A default of None is always allowed. Arguments that it does not have, and those that are
    missing, are such errors, too.

    Args:
        error (type): What to raise. Defaults to UserError.
        **checks (Check): What arguments have to be, by their names.

    Returns:
        Callable: The decorator.
    """
    def decorate(function: Callable) -> Callable:
        parameters = inspect.signature(function).parameters
        kinds = {item.kind for item in parameters.values()}
        is_constructor = function.__name__ == '__init__'
        names = [item.name for item in parameters.values() if item.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)]
        names = names[is_constructor:]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            owner = type(args[0]).__name__ if is_constructor else function.__name__
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                check_keys(kwargs, names, owner, error)
            given = dict(zip(names, args[is_constructor:]), **kwargs)
            for name in names:
                default = parameters[name].default
                if name not in given and default is inspect.Parameter.empty:
                    raise error(f'{owner} needs the option {name}')
            for name, check in checks.items():
                if name in given and not (given[name] is None and parameters[name].default is None):
                    check_value(name, given[name], check, error, owner)
            return function(*args, **kwargs)

        return wrapper

    return decorate
