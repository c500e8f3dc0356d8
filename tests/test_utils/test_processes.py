# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Processes of plain Python, which start in no time."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmgcp.utils import processes
from mmgcp.utils.processes import Terminated, ending_in_order, is_running, start_child, stop

FILE = Path(processes.__file__)
# A parent that starts a sleeping child, prints its number, and waits
PARENT = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location('processes', {str(FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
child = module.start_child([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
{{wait}}
"""
IGNORING = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(60)
"""
posix = pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends children')


def ends(pid, seconds=10):
    """Whether a process, which need not be a child of this one, ends in time."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        if 'Z' in Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]:
            return True  # it has ended, and nobody has asked for its status
        time.sleep(0.05)
    return not is_running(pid)


@linux
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, None])
def test_child_ends_with_its_parent(how):
    """Whether a signal ends it or its program."""
    code = PARENT.format(wait='time.sleep(60)' if how else 'time.sleep(0.5)')
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_running(child)
    if how:
        parent.send_signal(how)
    parent.wait(20)
    assert ends(child)


def test_child_gets_its_arguments():
    child = start_child([sys.executable, '-c', 'import sys; print(sys.argv[1:])', 'a b', "c'"],
                        stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=60)[0] == f'{["a b", chr(99) + chr(39)]}\n'
    assert child.returncode == 0


def test_child_of_a_parent_that_has_ended_does_not_begin():
    """It may have ended before the child asked to end with it."""
    result = subprocess.run([sys.executable, str(FILE), '1', sys.executable, '-c', 'print(1)'],
                            stdout=subprocess.PIPE, text=True)
    assert not result.stdout


@posix
@pytest.mark.parametrize('code, status', [
    ('import time; print("ready", flush=True); time.sleep(60)', -signal.SIGTERM),
    (IGNORING, -signal.SIGKILL),
    ('print("ready", flush=True)', 0)])
def test_stop(monkeypatch, code, status):
    """One that does not end when it is told to is killed; one that ends by itself is not."""
    monkeypatch.setattr(processes, 'GRACE', 0.5)
    child = start_child([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'ready\n'
    assert stop(child, patience=30 if status == 0 else 0) == status
    child.stdout.close()


@pytest.fixture
def hangup():
    """What SIGHUP does by default, although nohup may have turned it off."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@posix
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_in_order(number, hangup):
    cleaned, before = [], signal.getsignal(number)
    with pytest.raises(Terminated) as caught:
        with ending_in_order():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                cleaned.append(True)
    assert cleaned and caught.value.code == 128 + number
    assert caught.value.signal_name == number.name
    assert signal.getsignal(number) == before


@posix
@pytest.mark.parametrize('handled', [True, False])
def test_signals_that_are_left_alone(monkeypatch, handled):
    """Those with a handler, and those of one of several processes."""
    if handled:
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        monkeypatch.setenv('WORLD_SIZE', '2')
    try:
        before = signal.getsignal(signal.SIGTERM)
        with ending_in_order():
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        if handled:
            signal.signal(signal.SIGTERM, handler)


@linux
def test_workers_end_with_the_process_that_forked_them():
    """A pool's would wait for ever for work."""
    code = PARENT.split('child =')[0] + """
import os
module.end_workers_with_this()
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.wait(20)
    assert ends(worker)


def handler_of(number):
    """What a signal does in this process; in Python 3.8 signal.getsignal cannot be sent to it."""
    return signal.getsignal(number)


@posix
def test_workers_of_a_pool_end():
    """They wait for a lock, where an exception would leave them waiting for another one."""
    with ending_in_order():
        for _ in range(5):
            with multiprocessing.get_context('fork').Pool(2) as pool:
                handlers = pool.map(handler_of, [signal.SIGTERM] * 4)
                assert handlers == [signal.SIG_DFL] * 4
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_is_running():
    process = subprocess.Popen([sys.executable, '-c', ''])
    assert is_running(os.getpid())
    process.wait()
    assert not is_running(process.pid) or os.name != 'posix'


SLOW_FORK = """
import os, signal, time
os.register_at_fork(after_in_child=lambda: time.sleep(1))  # before that of the module
from mmgcp.utils.processes import ending_in_order
with ending_in_order():
    for number in (signal.SIGTERM, signal.SIGHUP):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, number)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
    os.kill(os.getpid(), signal.SIGTERM)
"""


@posix
def test_signal_while_a_worker_is_forked(hangup):
    """It is not lost, so that a pool which ends does not wait for ever; nor is a later one."""
    result = subprocess.run([sys.executable, '-c', SLOW_FORK], stderr=subprocess.PIPE, text=True,
                            timeout=50, env=dict(os.environ, PYTHONPATH=str(FILE.parents[2])))
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
