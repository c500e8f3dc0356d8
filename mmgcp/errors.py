# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What goes wrong because of what the user asked for."""


class UserError(ValueError):
    """A request that cannot be met; its message is one sentence for the user.

    The command-line tools print it without a traceback.
    """


class PruningError(UserError):
    """A pruning request that cannot be met; nothing has been changed."""
