# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Folders of results: tried before the work, written by one run at a time, replaced as a whole."""
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Collection, Dict, Iterator

from mmgcp.errors import UserError

from .processes import is_running

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = '.lock'
UNWRITTEN = '.unwritten-'  # in names of what is written aside
RENAME_EXCHANGE = 2  # of Linux's renameat2()
AT_FDCWD = -100
# A process that has ended has no lock, but the file system of several machines may notice late
PATIENCE = 3.  # seconds

_held: Dict[Path, IO] = {}  # locks of this process, which would not refuse it a second time


@contextmanager
def work_dir(folder: Path, size: int = 0) -> Iterator[Path]:
    """Make a folder for the block, which is the only run that works in it, or say why not.

    What killed runs have left half-written in it is deleted. If the block leaves the folder
    empty, it is removed again, with the folders above it that were made for it.

    Args:
        folder (Path): The folder, which may exist.
        size (int): Bytes that will be written at least. Defaults to 0.

    Yields:
        Path: The folder, with symbolic links followed.

    Raises:
        UserError: Something else is in its place, it cannot be written to, there is too little
            space, or another process works in it.
    """
    folder = Path(folder).resolve()
    with ExitStack() as stack:
        try:
            _make(folder, stack)
            stack.enter_context(_locked(folder))
            _clear_temporaries(folder)
            _try_to_write(folder, size)
        except OSError as error:
            raise UserError(f'{folder} cannot be written to: {error.strerror or error}') from error
        yield folder


def _make(folder: Path, stack: ExitStack) -> None:
    """Make a folder and those above it; the empty ones of these go when the stack unwinds."""
    missing = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        if path.exists() or path.is_symlink():
            raise UserError(f'{path} is a file, not a folder to write to')
        missing.append(path)
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        stack.callback(_remove_if_empty, path)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # there are results


def _try_to_write(folder: Path, size: int) -> None:
    """Raise an OSError unless a file of so many bytes can be written."""
    with tempfile.NamedTemporaryFile(dir=str(folder), prefix=UNWRITTEN) as file:
        file.write(b'x')
        file.flush()
        try:
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of some file systems
                raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with this process, whatever ends it."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    if path in _held:
        raise UserError(f'this process works in {folder} already')
    _held[path] = file = _open_lock(path)
    file.truncate(0)
    json.dump(dict(pid=os.getpid(), host=socket.gethostname(), command=' '.join(sys.argv),
                   since=time.strftime('%Y-%m-%d %H:%M:%S')), file)
    file.flush()
    try:
        yield
    finally:
        del _held[path]
        if path.exists():
            path.unlink()  # before it is free: who waits for it looks whether it is still there
        file.close()


def _open_lock(path: Path) -> IO:
    """Open and lock a file, or raise a UserError that says who has locked it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
        if _take(file):
            if _is_at(file, path):
                return file
            file.close()
            continue
        holder = _holder(file)
        file.close()
        if holder.get('running') or time.monotonic() > deadline:
            raise UserError(f'another run works in {path.parent}: {_describe(holder)}; wait for '
                            'its end, end it, or choose another folder')
        time.sleep(0.1)


def _take(file: IO) -> bool:
    """Lock an open file, which is free again when this process ends; False if it is taken."""
    try:
        # Of the process alone: children of a data loader do not inherit it, and may live longer
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(f'{file.name} cannot be locked ({error.strerror}): see to it that no other '
                      'run writes to the same folder', stacklevel=2)
    return True


def _is_at(file: IO, path: Path) -> bool:
    """Whether an open file is still the one at a path, and not one that was deleted."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(str(path)))
    except FileNotFoundError:
        return False


def _holder(file: IO) -> dict:
    """Return what the holder of a lock has written into it, and whether it is running."""
    file.seek(0)
    try:
        holder = json.load(file)
        here = holder['host'] == socket.gethostname()
        return dict(holder, running=not here or is_running(int(holder['pid'])))
    except (ValueError, KeyError, TypeError):  # it is just being written
        return {}


def _describe(holder: dict) -> str:
    if not holder:
        return 'a process that has just begun'
    return '`{command}`, process {pid} on {host}, since {since}'.format(**holder)


def _clear_temporaries(folder: Path) -> None:
    """Delete what killed runs have left half-written in a locked folder, and beside it."""
    for path in folder.iterdir():
        # The second kind is that of mmgcp.utils.cli.replacing()
        if path.name.startswith(UNWRITTEN) or re.match(r'\.\d+-', path.name):
            _delete(path)
    for path in folder.parent.glob(f'.{glob.escape(folder.name)}{UNWRITTEN}????????'):
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a file or a folder, or as much of it as can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path), ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def replacing_results(folder: Path, known: Collection[str]) -> Iterator[Path]:
    """Replace the results in a folder by those of the block: all of them, or none.

    The block writes to another folder, which then takes the place of the old one, in one step.
    Everything else that is in the folder stays. Where folders cannot be exchanged (on other
    systems than Linux, a mounted folder, or the working directory), the old files are deleted and
    the new ones moved in, so that files of two runs are never side by side.

    Args:
        folder (Path): The folder, which exists and is the :func:`work_dir` of this run.
        known (Collection[str]): Names of the files that are results, and do not stay if the
            block does not write them.

    Yields:
        Path: The folder to write to.
    """
    movable = os.access(str(folder.parent), os.W_OK) and not os.path.ismount(str(folder))
    place, prefix = (folder.parent, f'.{folder.name}') if movable else (folder, '')
    temporary = Path(tempfile.mkdtemp(dir=str(place), prefix=f'{prefix}{UNWRITTEN}'))
    try:
        new = temporary / folder.name
        new.mkdir()
        yield new
        written = [path.name for path in new.iterdir()]
        for name in written:
            _sync(new / name)
        results = {*known, *written}
        movable = movable and folder not in (Path.cwd(), *Path.cwd().parents)
        if not (movable and _exchange_folders(new, folder, results)):
            _exchange_files(new, folder, results)
    finally:
        _delete(temporary)


def _exchange_files(new: Path, folder: Path, results: Collection[str]) -> None:
    """Replace the files of a folder one by one, after all old ones have been deleted."""
    for name in results:
        if (folder / name).exists():
            (folder / name).unlink()
    for path in new.iterdir():
        if path.name in results:
            os.replace(str(path), str(folder / path.name))


def _exchange_folders(new: Path, folder: Path, results: Collection[str]) -> bool:
    """Put a new folder in the place of another one in one step, if the system can."""
    rename = getattr(ctypes.CDLL(None), 'renameat2', None) if sys.platform == 'linux' else None
    if rename is None:
        return False
    shutil.copymode(str(folder), str(new))
    _link_others(folder, new, results)
    paths = [os.fsencode(str(path)) for path in (new, folder)]
    if rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) != 0:
        return False
    for path in new.iterdir():  # the old one, in which someone may have written meanwhile
        if path.name not in results and not os.path.lexists(str(folder / path.name)):
            os.replace(str(path), str(folder / path.name))
    return True


def _sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def _link_others(old: Path, new: Path, results: Collection[str]) -> None:
    """Give a new folder everything that is in the old one but the results."""
    for path in old.iterdir():
        target = new / path.name
        if path.name == LOCK:
            with suppress(OSError):  # a copy would not be locked
                os.link(str(path), str(target))
        elif path.name in results:
            continue
        elif path.is_dir() and not path.is_symlink():
            shutil.copytree(str(path), str(target), symlinks=True, copy_function=_link)
        else:
            _link(str(path), str(target))


def _link(source: str, target: str) -> None:
    """Make a second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
