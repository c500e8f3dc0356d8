# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import os
import signal
import subprocess
import sys

import pytest
from faults import write_training
from scripts import ROOT, environment

from mmgcp.errors import UserError
from mmgcp.pipeline.tool_runner import ToolRunner
from mmgcp.utils import processes


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


@pytest.mark.parametrize('left, resumed, says', [
    ({}, None, ''),
    ({'epoch_1.pth': 'whole', 'last_checkpoint': 'epoch_1.pth'}, 'epoch_1.pth', ''),
    ({'epoch_1.pth': 'whole', 'epoch_2.pth': 'whole', 'last_checkpoint': 'epoch_1.pth'},
     'epoch_2.pth', ''),
    ({'epoch_1.pth': 'whole', 'epoch_2.pth': 'cut', 'last_checkpoint': 'epoch_1.pth'},
     'epoch_1.pth', 'is the newest checkpoint that is whole'),
    ({'epoch_2.pth': 'cut', 'last_checkpoint': 'epoch_1.pth'}, None, 'starts from the beginning')])
def test_training_goes_on(runner, capfd, left, resumed, says):
    """From the newest checkpoint that is whole; without one it begins."""
    write_tool(runner, 'train.py', code='print(sys.argv[1:])')
    write_training(runner.folder / 'sparse', left)
    runner.train('sparse', runner.folder / 'sparse.py', 'a=1')
    output = capfd.readouterr().out
    folder = str(runner.folder / 'sparse')
    resume = ['--resume', f'{folder}/{resumed}'] if resumed else []
    assert output.splitlines()[-1] == '[sparse] ' + str(
        [f'{folder}.py', '--work-dir', folder, *resume, '--cfg-options', 'a=1'])
    assert says in output and len(output.splitlines()) == 2 + bool(says)
    before = {path.name for path in (runner.folder / 'sparse').iterdir()}
    runner.begin('sparse')
    runner.train('sparse', runner.folder / 'sparse.py', 'a=1')
    assert '--resume' not in capfd.readouterr().out.splitlines()[-1]
    assert {path.name for path in (runner.folder / 'sparse').iterdir()} == {'begun.txt', *before}


# As run_tool() does, without the time that all imports take
WORKING = """
import importlib.util, pathlib, time
spec = importlib.util.spec_from_file_location('processes', {processes!r})
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
with processes.ending_in_order():
    try:
        print('working', flush=True)
        time.sleep(600)
    finally:
        pathlib.Path({file!r}).touch()
"""
RUNNING = """
import sys
from pathlib import Path
from mmgcp.pipeline.tool_runner import ToolRunner
from mmgcp.utils.cli import run_tool
tools = ToolRunner(*map(Path, sys.argv[1:]))
run_tool(lambda: tools.run('sparse', 'train.py'))
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_signal_to_the_runner_alone(runner, tmp_path, number):
    """The tool ends long before it would have finished, and in order."""
    write_tool(runner, 'train.py', code=WORKING.format(
        processes=processes.__file__, file=str(tmp_path / 'cleaned')))
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', RUNNING, str(runner.tools_dir), str(runner.folder)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(dict(PYTHONPATH=str(ROOT))))
    while 'working' not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert errors.strip() in ('interrupted', 'ended by SIGTERM')
    assert (tmp_path / 'cleaned').exists()
    assert (runner.folder / 'sparse' / 'log.txt').read_text() == 'working\n'


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
