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


class UserError(ValueError):
    """A request that cannot be met; the message is one sentence for the user."""


class PruningError(UserError):
    """A pruning request that cannot be met; the model has not been changed."""


class VOCError(UserError):
    """A data set that is not in PASCAL VOC's layout, or does not have the expected classes."""


class DarknetError(UserError):
    """A Darknet file, or a model, that cannot be converted."""


def described(error: BaseException) -> str:
    """Return an error of other code in one line: its type, and its message if there is one."""
    return ': '.join(filter(None, (type(error).__name__, ' '.join(str(error).split()))))
