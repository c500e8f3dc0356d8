# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

import pytest
from mmengine.config import DictAction

from mmgcp.errors import UserError
from mmgcp.pipeline import CompressOptions
from mmgcp.pipeline.options import (
    add_arguments,
    check_options,
    given,
    option,
    options_table,
    positive,
)

DOCS = Path(__file__).parents[2] / 'docs' / 'training.md'


@dataclass
class Options:
    """Some of each kind."""
    name: str
    round_to: Optional[int] = option(None, 'multiples of 50%', positive, dict(metavar='N'))
    share: float = option(0.5, 'share to keep', positive, dict(group='amounts'))
    merge: str = option('or', 'rule', cli=dict(choices=('or', 'mean'), group='amounts'))
    dry_run: bool = option(False, 'write nothing')
    settings: Dict[str, object] = option({}, 'others', cli=dict(nargs='+', action=DictAction))

    def __post_init__(self):
        check_options(self)


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    return parser


@pytest.mark.parametrize('line, values', [
    ('', {}),
    ('--round-to 8 --share 1', dict(round_to=8, share=1.)),
    ('--merge mean --dry-run', dict(merge='mean', dry_run=True)),
    ('--settings a.b=1 c=d', dict(settings={'a.b': 1, 'c': 'd'})),
])
def test_given(parser, line, values):
    result = given(parser.parse_args(line.split()), Options)
    assert result == values and {name: type(value) for name, value in result.items()} == {
        name: type(value) for name, value in values.items()}
    assert Options('a', **result).share == values.get('share', 0.5)


def test_help(parser):
    text = parser.format_help()
    assert 'multiples of 50%\n' in text and '--round-to N' in text
    assert 'share to keep; default: 0.5' in text.split('amounts:')[1]
    assert 'write nothing\n' in text and '--name' not in text


@pytest.mark.parametrize('line', ['--merge max', '--round-to 8.5', '--dry-run 1'])
def test_wrong_arguments(parser, line):
    with pytest.raises(SystemExit):
        parser.parse_args(line.split())


def test_check():
    with pytest.raises(UserError, match='^--round-to must be positive, but is 0$'):
        Options('a', round_to=0)
    assert Options('a').round_to is None


def test_defaults_are_not_shared():
    Options('a').settings['b'] = 1
    assert Options('a').settings == {}


def test_table():
    assert options_table(Options).splitlines()[2:4] == [
        '| `--round-to` | multiples of 50% |', '| `--share` | share to keep; default: 0.5 |']


def test_docs_list_all_options():
    assert options_table(CompressOptions) in DOCS.read_text()
