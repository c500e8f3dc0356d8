# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Processes that end when they should: with the one that started them, or when they are told to.

This file is also run as a script, before the program of :func:`start_child`, and so imports
nothing but Python's own modules.
"""
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
GRACE = 10.  # seconds in which a process that is told to end may still finish a file

_handlers: Dict[int, Any] = {}  # what signals did before :func:`ending_in_order`, by their number
_before_fork = threading.local()  # its mask: the signals that waited anyway


class Terminated(SystemExit):
    """A signal has asked this process to end; its status is 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Raise :class:`Terminated` inside the block when SIGTERM or SIGHUP arrives.

    So what the block has begun is cleaned up. Signals that are ignored or handled otherwise stay
    so, and so do those of one of several processes, which may be waiting for another one where no
    exception reaches it.
    """

    def end(number: int, _: Any) -> None:
        raise Terminated(number)

    mine = []
    if threading.current_thread() is threading.main_thread() and 'WORLD_SIZE' not in os.environ:
        for number in (signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                _handlers[number] = signal.signal(number, end)
                mine.append(number)
    try:
        yield
    finally:
        _restore_handlers(mine)


def _restore_handlers(numbers: Optional[Iterable[int]] = None) -> None:
    """Let signals, by default all of them, do what they did before."""
    for number in list(_handlers) if numbers is None else numbers:
        signal.signal(number, _handlers.pop(number))


def _hold_signals() -> None:
    """Let signals wait that would raise in a process that is being forked, where it is lost."""
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, list(_handlers))


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _begin_worker() -> None:
    """Leave signals to the system: pools end workers by SIGTERM while they wait for a lock."""
    _restore_handlers()
    _release_signals()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals,
                        after_in_child=_begin_worker)


def start_child(command: Sequence[str], **settings) -> subprocess.Popen:
    """Start a program that Linux ends when this process ends, whatever ends this one.

    On other systems it only ends when it is told to: see :func:`stop`.

    Args:
        command (Sequence[str]): The program and its arguments.
        **settings: Those of :class:`subprocess.Popen`.

    Returns:
        subprocess.Popen: The process.
    """
    return subprocess.Popen([sys.executable, '-I', '-S', os.path.abspath(__file__),
                             str(os.getpid()), *command], **settings)


def stop(process: subprocess.Popen, patience: float = 0.) -> int:
    """End a child, in order if it can do so in time.

    Args:
        process (subprocess.Popen): The child.
        patience (float): Seconds before it is told to end, in which it may end by itself, as
            when an interrupt from the terminal has reached it, too. Defaults to 0.

    Returns:
        int: Its status.
    """
    for tell, seconds in ((lambda: None, patience), (process.terminate, GRACE),
                          (process.kill, None)):
        tell()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def end_with_parent() -> None:
    """Let Linux kill this process when the thread that started it ends."""
    if sys.platform == 'linux':
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@functools.lru_cache(maxsize=None)
def end_workers_with_this() -> None:
    """Let all processes that fork from this one, such as those of pools, end with it (Linux)."""
    if hasattr(os, 'register_at_fork'):
        os.register_at_fork(after_in_child=end_with_parent)


def is_running(pid: int) -> bool:
    """Whether there is a process with this number on this machine; True where it is not known."""
    if os.name != 'posix':  # where os.kill() would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _become_child(parent: int, *command: str) -> None:
    """Turn into a program, unless the parent has ended already."""
    end_with_parent()
    if os.getppid() == parent:
        os.execv(command[0], command)


if __name__ == '__main__':
    _become_child(int(sys.argv[1]), *sys.argv[2:])
