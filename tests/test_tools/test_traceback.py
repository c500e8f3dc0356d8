# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every tool ends with one sentence, and shows how it came about if it is asked to."""
import os
from functools import partial

import pytest
from scripts import TOOLS, complaint, run_here

WRONG_ARGUMENTS = {
    'compress.py': ['nowhere.py'],
    'export.py': ['nowhere.py', 'nowhere.pth', 'out.onnx'],
    'prune.py': ['nowhere.py', 'nowhere.pth'],
    'test.py': ['nowhere.py', 'nowhere.pth'],
    'train.py': ['nowhere.py'],
    'analysis_tools/compare.py': ['nowhere.py', 'nowhere.pth'],
    'analysis_tools/draw_network.py': ['nowhere'],
    'analysis_tools/pareto.py': ['nowhere.py', 'nowhere.pth'],
    'analysis_tools/plot_sparsity.py': ['nowhere.py', 'nowhere.pth'],
    'dataset_converters/make_demo_dataset.py': ['shapes', '--size', '1'],
    'model_converters/darknet_to_mmgcp.py': ['nowhere.cfg', 'nowhere.weights', 'out.pth'],
    'model_converters/mmgcp_to_darknet.py': ['nowhere.py', 'nowhere.pth', 'out'],
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a tool in this process, in an empty folder."""
    monkeypatch.setenv('MMGCP_TRACEBACK', '0')
    return partial(run_here, cwd=tmp_path)


def test_all_tools_are_tested():
    paths = [path.relative_to(TOOLS) for path in TOOLS.rglob('*.py')]
    assert {path.as_posix() for path in paths if path.parts[0] != 'environment'} == set(
        WRONG_ARGUMENTS)


@pytest.mark.parametrize('name', WRONG_ARGUMENTS)
def test_help_tells_of_it(run, name):
    result = run(name, '--help')
    assert result.returncode == 0 and 'mended' not in result.stdout
    assert '--traceback ' in result.stdout and 'MMGCP_TRACEBACK=1' in result.stdout


@pytest.mark.parametrize('name', WRONG_ARGUMENTS)
def test_whole_story(run, name):
    sentence = complaint(run(name, *WRONG_ARGUMENTS[name]))
    result = run(name, '--traceback', *WRONG_ARGUMENTS[name])
    *story, reason, same = result.stderr.strip().splitlines()
    assert same == sentence and 'Traceback (most recent call last)' in story[0]
    assert reason.endswith(sentence.split(': ', 1)[1])
    assert os.environ['MMGCP_TRACEBACK'] == '1'  # for the tools that it runs
