# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import sys

import pytest

from mmgcp.errors import UserError
from mmgcp.pipeline.tool_runner import ToolRunner


@pytest.fixture
def runner(tmp_path):
    """A runner with tools that are said in the test."""
    for folder in ('tools', 'work'):
        (tmp_path / folder).mkdir()
    return ToolRunner(tmp_path / 'tools', tmp_path / 'work')


def write_tool(runner, name, lines=(), code=''):
    text = ''.join(f'print({line!r})\n' for line in lines)
    (runner.tools_dir / name).write_text(f'import sys\n{text}{code}\n')


def test_output_is_passed_on(runner, capfd):
    lines = ['System environment:', 'Epoch(train)  [1][10/19]  loss: 2.9560', '', '| RBC | 0.5 |']
    write_tool(runner, 'train.py', lines, "print('warning', file=sys.stderr)")
    runner.run('baseline', 'train.py', 'a b.py', '--work-dir', 'c')
    output = capfd.readouterr()
    lines.append('warning')
    assert output.out.splitlines() == [
        "[baseline] train.py 'a b.py' --work-dir c", *(f'[baseline] {line}' for line in lines)]
    assert not output.err
    log = runner.folder / 'baseline' / 'log.txt'
    assert log.read_text().splitlines() == lines
    runner.run('baseline', 'train.py')  # resumed
    assert log.read_text().splitlines() == lines * 2


@pytest.mark.parametrize('code, last', [
    ("sys.exit('train.py: there is no config a.py')", 'train.py: there is no config a.py'),
    ("print('reason', file=sys.stderr)\nprint()\nsys.exit(3)", 'reason'),
    ("raise RuntimeError('a bug')", 'RuntimeError: a bug'),
])
def test_failure(runner, code, last):
    write_tool(runner, 'train.py', ['before'], code)
    with pytest.raises(UserError) as caught:
        runner.run('sparse', 'train.py')
    log = runner.folder / 'sparse' / 'log.txt'
    assert str(caught.value) == (
        f'train.py failed in stage sparse: {last} (whole output: {log})')
    assert log.read_text().startswith('before\n') and last in log.read_text()


def test_arguments_and_metrics(runner):
    code = """
import json, pathlib
config, checkpoint, option, work_dir = sys.argv[1:]
assert option == '--work-dir'
pathlib.Path(work_dir).mkdir(parents=True, exist_ok=True)
if config != 'silent.py':
    text = json.dumps(dict(mAP=0.5, files=[config, checkpoint]))
    (pathlib.Path(work_dir) / 'metrics.json').write_text(text)
"""
    write_tool(runner, 'test.py', code=code)
    assert runner.test('baseline', 'a b.py', 'c.pth') == dict(mAP=0.5, files=['a b.py', 'c.pth'])
    metrics = json.loads((runner.folder / 'baseline' / 'test' / 'metrics.json').read_text())
    assert metrics['mAP'] == 0.5
    assert runner.test('baseline', 'd.py', 'e.pth') == dict(mAP=0.5, files=['d.py', 'e.pth'])
    with pytest.raises(UserError, match='test.py wrote no metrics in stage baseline'):
        runner.test('baseline', 'silent.py', 'e.pth')  # those of before do not count


PARSER = """
import argparse

def parse_args(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument('--number', type=int)
    return parser.parse_args(arguments)
"""


def test_parse(runner):
    """Without running the tool, and without a change to this process."""
    write_tool(runner, 'tool.py', code=PARSER)
    before = list(sys.argv)
    assert runner.parse('tool.py', '--number', '3').number == 3
    for arguments, reason in ((['--number', 'a b'], "invalid int value: 'a b'"),
                              (['--other'], 'unrecognized arguments: --other')):
        with pytest.raises(UserError, match=reason) as caught:
            runner.parse('tool.py', *arguments)
        assert str(caught.value).startswith('tool.py does not take --')
    assert sys.argv == before
