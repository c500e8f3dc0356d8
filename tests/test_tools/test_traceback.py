# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every tool ends with one sentence, and shows how it came about if it is asked to."""
import os
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
WRONG_ARGUMENTS = {
    'compress.py': ['nowhere.py'],
    'prune.py': ['nowhere.py', 'nowhere.pth'],
    'test.py': ['nowhere.py', 'nowhere.pth'],
    'train.py': ['nowhere.py'],
    'analysis_tools/plot_sparsity.py': ['nowhere.py', 'nowhere.pth'],
    'dataset_converters/make_demo_dataset.py': ['shapes', '--size', '1'],
    'model_converters/darknet_to_mmgcp.py': ['nowhere.cfg', 'nowhere.weights', 'out.pth'],
    'model_converters/mmgcp_to_darknet.py': ['nowhere.py', 'nowhere.pth', 'out'],
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A function that runs a tool in this process and returns its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('MMGCP_TRACEBACK', '0')

    def run_tool(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOLS / name), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOLS / name), run_name='__main__')
        return caught.value.code, capsys.readouterr()

    return run_tool


def test_all_tools_are_tested():
    assert {path.relative_to(TOOLS).as_posix() for path in TOOLS.rglob('*.py')} == set(
        WRONG_ARGUMENTS)


@pytest.mark.parametrize('name', WRONG_ARGUMENTS)
def test_help_tells_of_it(run, name):
    code, output = run(name, '--help')
    assert not code and 'mended' not in output.out
    assert '--traceback ' in output.out and 'MMGCP_TRACEBACK=1' in output.out


@pytest.mark.parametrize('name', WRONG_ARGUMENTS)
def test_whole_story(run, name):
    sentence, output = run(name, *WRONG_ARGUMENTS[name])
    assert sentence.startswith(f'{Path(name).name}: ') and len(sentence.splitlines()) == 1
    assert 'Traceback' not in output.err
    same, output = run(name, '--traceback', *WRONG_ARGUMENTS[name])
    assert same == sentence
    assert 'Traceback (most recent call last)' in output.err
    assert output.err.strip().splitlines()[-1].endswith(sentence.split(': ', 1)[1])
    assert os.environ['MMGCP_TRACEBACK'] == '1'  # for the tools that it runs
