# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The tiers of tests.

`make test` leaves out what is marked as slow, CI what is marked as exhaustive, and `make test-all`
nothing.
"""
import pytest

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def slow_except(fast, values, marks=EXHAUSTIVE):
    """The values of a parameter, of which only some belong to the fast tier.

    Args:
        fast: The values that do.
        values: All of them.
        marks: Those of the others, by default for what CI leaves out, too.
    """
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=marks) for value in values]
