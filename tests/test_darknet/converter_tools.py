# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running the two tools in this process."""
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools' / 'model_converters'


def run_tool(monkeypatch, name, *args):
    """Run a tool; an error is a SystemExit with the sentence."""
    monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
    runpy.run_path(str(TOOLS / name), run_name='__main__')


def fail(monkeypatch, name, *args):
    """Run a tool until it gives up and return why."""
    with pytest.raises(SystemExit) as info:
        run_tool(monkeypatch, name, *args)
    message = str(info.value.code)
    assert message.startswith(f'{name}: ') and '\n' not in message
    return message
