# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import sys
from pathlib import Path

import mmyolo
import pytest

from mmgcp.errors import UserError
from mmgcp.utils.mmyolo_tools import load_mmyolo_tool


@pytest.mark.parametrize('name, arguments', [('train.py', ['a.py', '--resume']),
                                             ('test.py', ['a.py', 'b.pth'])])
def test_tools(monkeypatch, name, arguments):
    monkeypatch.setenv('LOCAL_RANK', '0')
    tool = load_mmyolo_tool(name)
    assert 'mmyolo' in Path(tool.__file__).parts and Path(tool.__file__).name == name
    monkeypatch.setattr(sys, 'argv', [name, *arguments])
    assert tool.parse_args().config == 'a.py'
    assert callable(tool.main)


def test_tools_of_a_clone(monkeypatch, tmp_path):
    """In a clone of the repository the tools are beside the package."""
    for folder in ('mmyolo', 'tools'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'tools' / 'train.py').write_text("origin = 'clone'\n")
    monkeypatch.setattr(mmyolo, '__file__', str(tmp_path / 'mmyolo' / '__init__.py'))
    assert load_mmyolo_tool('train.py').origin == 'clone'
    with pytest.raises(UserError) as caught:
        load_mmyolo_tool('test.py')
    assert str(caught.value) == (
        f'the MMYOLO in {tmp_path / "mmyolo"} comes without its tools (test.py)')


def test_unknown_tool():
    with pytest.raises(UserError, match=r'comes without its tools \(nothing.py\)'):
        load_mmyolo_tool('nothing.py')
