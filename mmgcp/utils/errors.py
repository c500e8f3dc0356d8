# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.


class UserError(ValueError):
    """A request that cannot be met; its message is one sentence for the user.

    The command-line tools print it without a traceback.
    """
