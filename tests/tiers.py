# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The two tiers: `make test` leaves out what is marked as slow, `make test-all` does not."""
import pytest


def slow_except(fast, values):
    """The values of a parameter, of which only some belong to the fast tier.

    Args:
        fast: The values that do.
        values: All of them.
    """
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow)
            for value in values]
