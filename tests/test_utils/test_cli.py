# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import argparse
import os
import signal
import subprocess
import sys

import pytest

from mmgcp.errors import UserError
from mmgcp.utils.cli import CfgOptions, replacing, run_tool
from mmgcp.utils.processes import Terminated


def raising(error):

    def main():
        raise error

    return main


@pytest.fixture(autouse=True)
def tool_name(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/some/where/tool.py', 'argument'])
    monkeypatch.setenv('MMGCP_TRACEBACK', '0')


def test_success():
    calls = []
    run_tool(lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize('error, message', [
    (UserError('there is no config x.py'), 'tool.py: there is no config x.py'),
    (FileNotFoundError(2, 'No such file or directory', 'x.txt'),
     "tool.py: [Errno 2] No such file or directory: 'x.txt'"),
    (PermissionError(13, 'Permission denied', 'x'), "tool.py: [Errno 13] Permission denied: 'x'"),
])
def test_user_errors(error, message):
    """SystemExit with a text: Python prints it to stderr and ends with status 1."""
    with pytest.raises(SystemExit) as caught:
        run_tool(raising(error))
    assert caught.value.code == message


def test_interrupt(capsys):
    with pytest.raises(SystemExit) as caught:
        run_tool(raising(KeyboardInterrupt()))
    assert caught.value.code == 130
    output = capsys.readouterr()
    assert output.err.strip() == 'interrupted' and not output.out


@pytest.mark.parametrize('end, code, said', [
    (KeyboardInterrupt(), 130, 'interrupted'),
    (Terminated(signal.SIGTERM), 143, 'ended by SIGTERM')])
def test_interrupt_in_disguise(end, code, said, capsys):
    """As MMEngine makes a SyntaxError of all that is raised while it formats a config."""
    def main():
        try:
            try:
                raise end
            except BaseException:
                raise SyntaxError('Failed to format the config file') from None
        except SyntaxError as error:
            raise UserError('the config cannot be written') from error

    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    assert caught.value.code == code
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize('kind', [RuntimeError, ValueError, KeyError, AssertionError])
def test_bugs_keep_their_traceback(kind):
    with pytest.raises(kind):
        run_tool(raising(kind('a bug')))


def failing():
    """Fail in two steps, of which the first is hidden."""
    try:
        raise KeyError('the cause')
    except KeyError:
        raise UserError('the sentence') from None


def ask_by_option(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tool.py', 'one', '--traceback', 'two'])


def ask_by_variable(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tool.py', 'one', 'two'])
    monkeypatch.setenv('MMGCP_TRACEBACK', '1')


@pytest.mark.parametrize('ask', [ask_by_option, ask_by_variable])
def test_traceback(monkeypatch, capsys, ask):
    """All steps, then the sentence; the tool does not see the option."""
    ask(monkeypatch)
    with pytest.raises(SystemExit) as caught:
        run_tool(failing)
    assert caught.value.code == 'tool.py: the sentence' and sys.argv[1:] == ['one', 'two']
    output = capsys.readouterr().err
    assert output.count('Traceback (most recent call last)') == 2
    assert output.index("KeyError: 'the cause'") < output.index('UserError: the sentence')


def test_no_traceback_unless_asked(capsys):
    with pytest.raises(SystemExit):
        run_tool(failing)
    assert not capsys.readouterr().err


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['tool.py', '--help'])
    with pytest.raises(SystemExit) as caught:
        run_tool(argparse.ArgumentParser().parse_args)
    assert not caught.value.code
    assert '--traceback' in capsys.readouterr().out


def parse_cfg_options(*values):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions)
    return parser.parse_args(['--cfg-options', *values]).cfg_options


def test_cfg_options():
    assert parse_cfg_options('model.width=3', 'sizes=[1,2]') == {
        'model.width': 3, 'sizes': [1, 2]}


@pytest.mark.parametrize('value', ['model.width', 'sizes=[1,(2]'])
def test_wrong_cfg_options(capsys, value):
    with pytest.raises(SystemExit) as caught:
        parse_cfg_options('epochs=3', value)
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(
        f'argument --cfg-options: expected key=value pairs, but got epochs=3 {value}')


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    with replacing(tmp_path / 'a.txt', str(tmp_path / 'b.png')) as temporaries:
        for temporary in temporaries:
            assert temporary.parent == tmp_path
            temporary.write_text('new')
        assert [temporary.suffix for temporary in temporaries] == ['.txt', '.png']
        assert (tmp_path / 'a.txt').read_text() == 'old' and not (tmp_path / 'b.png').exists()
    assert names(tmp_path) == ['a.txt', 'b.png']
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ['new', 'new']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('number', [0, 1, 2])
def test_failure_changes_nothing(tmp_path, error, number):
    """However many of the files are already written."""
    (tmp_path / 'a.txt').write_text('old')
    with pytest.raises(error):
        with replacing(tmp_path / 'a.txt', tmp_path / 'b.txt') as temporaries:
            for temporary in temporaries[:number]:
                temporary.write_text('new')
            raise error
    assert names(tmp_path) == ['a.txt'] and (tmp_path / 'a.txt').read_text() == 'old'


def test_forgotten_file(tmp_path):
    """A file that was not written is an error, and no temporary stays."""
    with pytest.raises(FileNotFoundError):
        with replacing(tmp_path / 'a.txt', tmp_path / 'b.txt') as temporaries:
            temporaries[1].write_text('new')
    assert names(tmp_path) == []


LOGGING = ('import logging; logger = logging.getLogger(); '
           'logger.addHandler(logging.StreamHandler(sys.stdout)); '
           'logger.error("a line"); logger.error("another")')


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('script, options', [
    ('print("a line")', []), (LOGGING, []),
    ('argparse.ArgumentParser().parse_args()', ['--help'])])
def test_nobody_reads_the_output(script, options, unbuffered):
    """It ends like other programs behind a pipe, without a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = (f'import argparse, sys\nfrom mmgcp.utils.cli import run_tool\n'
               f'def main():\n    {script}\nrun_tool(main)')
    done = subprocess.run([sys.executable, '-c', command, *options], stdout=write,
                          stderr=subprocess.PIPE, text=True,
                          env=dict(os.environ, PYTHONUNBUFFERED=unbuffered))
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ''


def test_another_broken_pipe(capsys):
    """It is an error like others."""
    def main():
        raise BrokenPipeError('to the worker')

    with pytest.raises(SystemExit, match='to the worker'):
        run_tool(main)
