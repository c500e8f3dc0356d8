# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmgcp.errors import PruningError, UserError, shown
from mmgcp.utils.checks import (
    BOOLEAN,
    CONFIG,
    COUNT,
    INPUT_SHAPE,
    LOSS_WEIGHT,
    NAME,
    PATH,
    PATTERNS,
    POSITIVE,
    SHARE,
    check_keys,
    check_value,
    checked,
    list_of,
    number_in,
    one_of,
)

OPEN = number_in(0, 1, open_low=True, open_high=True)
EXOTIC = [None, '', b'x', [], {}, object(), math.nan, 10**5000, torch.ones(2), np.ones(2), 1j]


@pytest.mark.parametrize('check, right, wrong', [
    (SHARE, [0, 1, 0.5, np.float32(0.5), Fraction(1, 2), np.int64(1)], [-1e-9, 1.01, True, '0.5']),
    (POSITIVE, [1e-300, 1, 1e308], [0, -1, math.inf, -math.inf, 10**400, False]),
    (OPEN, [0.5], [0, 1]),
    (COUNT, [1, 2**31 - 1, np.int32(3)], [0, 2**31, 1., True]),
    (LOSS_WEIGHT, [0, 1e6], [1e30, -1]),
    (BOOLEAN, [True, False], [0, 1, 'yes']),
    (NAME, ['a', 'b c'], ['', ' ', 'a\nb', 3]),
    (PATTERNS, [['a'], ('a', 'b*')], ['a', [], [3], [''], {'a'}]),
    (PATH, ['a.py', '/b'], ['', 'a\0b', 3]),
    (CONFIG, [dict(type='A'), dict(type=int, b=1)], [dict(), dict(type=3), dict(type='')]),
    (INPUT_SHAPE, [(3, 64, 64), [1, 32, 32]], [(3, 64), (3, 0, 64), (3, 64., 64), (3, 64, 10**6)]),
    (one_of('a', 1), ['a', 1], ['b', True, 1., 'A']),
])
def test_what_passes(check, right, wrong):
    assert [value for value in right if not check.passes(value)] == []
    assert [value for value in [*wrong, *EXOTIC] if check.passes(value)] == []


def test_a_list_may_be_empty():
    assert list_of(COUNT, '', empty=True).passes([])
    assert not list_of(COUNT, '', length=2).passes([1])


@pytest.mark.parametrize('check, text', [
    (SHARE, 'must be a number in [0, 1]'), (OPEN, 'must be a number in (0, 1)'),
    (number_in(0, 1, open_low=True), 'must be a number in (0, 1]'),
    (POSITIVE, 'must be a finite number above 0'), (number_in(2), 'must be a finite number of at '
                                                    'least 2'),
    (number_in(1, 9, integer=True), 'must be an integer from 1 to 9'),
    (number_in(1, integer=True), 'must be an integer of at least 1'),
    (number_in(1, text='must be large'), 'must be large')])
def test_texts(check, text):
    assert check.text == text


def test_values_are_shown_in_one_short_line():
    assert shown('a') == "'a'" and shown(math.nan) == 'nan'
    assert len(shown(list(range(10**4)))) < 130 and '\n' not in shown(torch.eye(3))
    assert 'int' in shown(10**5000) or len(shown(10**5000)) < 130


class Named:

    @checked(PruningError, size=COUNT, mode=one_of('a', 'b'))
    def __init__(self, size, mode='a', scale=None):
        self.size, self.mode, self.scale = size, mode, scale


class Open(Named):

    @checked(PruningError, extra=COUNT)
    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


@pytest.mark.parametrize('arguments, message', [
    (dict(size=0), "Named: size must be an integer from 1 to 2147483647, but is 0"),
    (dict(size=1, mode='c'), "Named: mode must be one of ['a', 'b'], but is 'c'"),
    (dict(size=1, mode=None), "Named: mode must be one of ['a', 'b'], but is None"),
    (dict(size=1, modes='a'), "Named has an unknown option 'modes'; did you mean 'mode'?"),
    (dict(size=1, nothing=1), "Named has an unknown option 'nothing'; there are size, mode, scale"),
    (dict(), 'Named needs the option size')])
def test_checked(arguments, message):
    with pytest.raises(PruningError) as caught:
        Named(**arguments)
    assert str(caught.value) == message


def test_right_values_pass():
    made = Named(3, 'b', scale='anything')
    assert (made.size, made.mode, made.scale) == (3, 'b', 'anything')
    made = Open(size=2)
    assert (made.size, made.extra) == (2, 1)


def test_subclasses_have_their_own_name():
    with pytest.raises(PruningError, match='^Open: size must be'):
        Open(size=0)
    with pytest.raises(PruningError, match="^Open: extra must be .* but is 'x'$"):
        Open(extra='x', size=1)
    with pytest.raises(UserError, match='by position'):
        check_value('scale by position', Named(1, 'a', 3).scale, one_of(4))


def test_positional_arguments_are_checked():
    with pytest.raises(PruningError, match="mode must be one of .* but is 'c'"):
        Named(1, 'c')


def test_functions():
    @checked(ratio=SHARE)
    def function(ratio=None):
        """Return it."""
        return ratio

    assert function() is None and function(None) is None and function(0.5) == 0.5
    assert function.__doc__ == 'Return it.'
    with pytest.raises(UserError, match='^function: ratio must be'):
        function(2)


def test_keys():
    check_keys(['a', 'b'], ['a', 'b', 'c'], 'it')
    with pytest.raises(UserError, match='it has an unknown option 3; there are none'):
        check_keys([3], [], 'it')
