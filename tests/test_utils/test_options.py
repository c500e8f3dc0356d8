# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import argparse
import math
from dataclasses import dataclass
from typing import Dict, Optional

import pytest

from mmgcp.errors import PruningError, UserError
from mmgcp.utils.checks import number_in, one_of
from mmgcp.utils.cli import CfgOptions
from mmgcp.utils.options import (
    add_arguments,
    check_options,
    given_options,
    option,
    options_table,
)

POSITIVE = number_in(0, text='must be positive', open_low=True)


@dataclass
class Options:
    """Some of each kind."""
    name: str = option(help='a name')
    round_to: Optional[int] = option(
        None, check=POSITIVE, cli=dict(type=int, metavar='N'), help='multiples of 50%')
    share: float = option(
        0.5, check=POSITIVE, cli=dict(group='amounts', type=float), help='share to keep')
    merge: str = option('or', check=one_of('or', 'mean'), help='rule', cli=dict(
        choices=('or', 'mean'), group='amounts'))
    settings: Dict[str, object] = option(
        factory=dict, cli=dict(nargs='+', action=CfgOptions), help='a | b', default_help='none')

    def __post_init__(self):
        check_options(self, PruningError)


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    return parser


@pytest.mark.parametrize('line, values', [
    ('', {}),
    ('--round-to 8 --share 1', dict(round_to=8, share=1.)),
    ('--merge mean', dict(merge='mean')),
    ('--settings a.b=1 c=d', dict(settings={'a.b': 1, 'c': 'd'})),
])
def test_given_options(parser, line, values):
    result = given_options(parser.parse_args(line.split()), Options)
    assert result == values and {name: type(value) for name, value in result.items()} == {
        name: type(value) for name, value in values.items()}
    assert Options('a', **result).share == values.get('share', 0.5)


def test_help(parser):
    text = parser.format_help()
    assert 'multiples of 50%\n' in text and '--round-to N' in text
    assert 'share to keep; default: 0.5' in text.split('amounts:')[1]
    assert 'a | b; default: none' in text and '--name' not in text


@pytest.mark.parametrize('line', ['--merge max', '--round-to 8.5', '--settings a', '--name a'])
def test_wrong_arguments(parser, line):
    with pytest.raises(SystemExit):
        parser.parse_args(line.split())


@pytest.mark.parametrize('options, message', [
    (dict(round_to=0), '^round_to must be positive, but is 0$'),
    (dict(share=None), 'share must be positive, but is None'),
    (dict(share=math.nan), 'share must be positive, but is nan'),
    (dict(merge='max'), r"merge must be one of \['or', 'mean'\], but is 'max'"),
])
def test_checks(options, message):
    with pytest.raises(PruningError, match=message) as caught:
        Options('a', **options)
    assert isinstance(caught.value, UserError)
    assert Options('a').round_to is None


def test_defaults_are_not_shared():
    Options('a').settings['b'] = 1
    assert Options('a').settings == {}


def test_table():
    assert options_table(Options).splitlines()[2:] == [
        '| `name` | none |  | a name |',
        '| `round_to` | `None` | `--round-to` | multiples of 50% |',
        '| `share` | `0.5` | `--share` | share to keep |',
        "| `merge` | `'or'` | `--merge` | rule |",
        '| `settings` | none | `--settings` | a \\| b |']
