# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import sys

import pytest
from scripts import ROOT, load_script


@pytest.fixture
def load_benchmark(monkeypatch):
    """A function that loads a benchmark and returns one that runs it in this process.

    The latter has the script as an attribute, whose functions may be replaced.
    """
    def load(name):
        path = ROOT / 'benchmarks' / name
        monkeypatch.syspath_prepend(str(path.parent))
        module = load_script(path)

        def run(*arguments):
            monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
            module.run_tool(module.main)

        run.module = module
        return run

    return load
