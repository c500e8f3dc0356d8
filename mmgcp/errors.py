# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The errors that a user can cause and mend: one family, all of them :class:`UserError`.

========================  ====================================================
:class:`UserError`        any request that cannot be met: configs, checkpoints,
                          options of hooks and distillers
:class:`PruningError`     pruning: options, plans, channel tables, criteria
:class:`VOCError`         data sets in PASCAL VOC's layout
:class:`DarknetError`     conversion from and to Darknet
========================  ====================================================

The message of each is one sentence, which the command-line tools print instead of a
traceback; see :func:`mmgcp.utils.cli.run_tool`. Any other error is a bug, or a misuse of a
function by the code that calls it, and keeps its traceback.
"""
from typing import Any

SHOWN = 120  # characters


class UserError(ValueError):
    """A request that cannot be met; the message is one sentence for the user."""


class PruningError(UserError):
    """A pruning request that cannot be met; the model has not been changed."""


class UnreachableError(PruningError):
    """A budget that cannot be reached, whatever is removed within the limits."""


class VOCError(UserError):
    """A data set that is not in PASCAL VOC's layout, or does not have the expected classes."""


class DarknetError(UserError):
    """A Darknet file, or a model, that cannot be converted."""


def told(error: BaseException) -> str:
    """Return what an error of another package says, in one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = ' '.join(str(text).split())
    for advice in (' Please check', ', the current sys.path is'):  # MMEngine's
        text = text.split(advice)[0]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def shown(value: Any) -> str:
    """Return a value of any kind as messages show it: in one line, and not too long."""
    try:
        text = ' '.join(repr(value).split())
    except Exception:  # such as for an integer of more digits than Python prints
        text = f'a {type(value).__name__} that cannot be shown'
    return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'
