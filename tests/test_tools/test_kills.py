# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A few of the moments at which tests/kills.py kills tools."""
import os
import sys

import pytest
from scripts import ROOT, TOOLS, run_code, run_process
from tiers import slow_except

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='what runs is read from /proc')
PATH = dict(PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / 'tests'))))
PRUNE_AT = """
import signal, sys
import kills
tool = kills.make('prune', sys.argv[1])
run = tool.run(tool.shares[1], int(sys.argv[2]))
assert run.ends() and run.status == signal.SIGKILL
assert kills.check_pruned(tool.out) == tool.shares[0]
tool.finish()
"""
COMPRESS_ALONE = """
import signal, sys
import kills
tool = kills.make('compress-alone', sys.argv[1])
run = tool.run()
run.wait_for('Checkpoints will be saved')
assert len(run.processes()) >= 2
run.kill(alone=True, number=signal.Signals(int(sys.argv[2])))
tool.check()
"""


def succeed(result):
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.mark.parametrize('number', slow_except([9], [1, 5, 9, 13, 17]))
def test_prune_at_an_event(tmp_path, number):
    """While it writes beside its folder: the earlier results are whole, and a rerun completes."""
    succeed(run_code(PRUNE_AT, tmp_path, str(number), **PATH))


@pytest.mark.parametrize('number', slow_except([9], [2, 9, 15]))
def test_compress_alone(tmp_path, number):
    """The training that it has started ends with it, whatever ends it."""
    succeed(run_code(COMPRESS_ALONE, tmp_path, str(number), **PATH))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('kind, points', [('prune', 3), ('train', 4), ('compress', 4),
                                          ('compress-alone', 4)])
def test_points(kind, points):
    succeed(run_process(TOOLS.parent / 'tests' / 'kills.py', kind, '--points', points, **PATH))
