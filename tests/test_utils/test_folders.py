# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import os
import subprocess
import sys

import pytest
from faults import root_only, small_disk
from scripts import ROOT, environment

from mmgcp.errors import UserError
from mmgcp.utils import folders
from mmgcp.utils.folders import replacing_results, work_dir

RESULTS = ('a.txt', 'b.txt', 'c.txt')
# Holds a folder until its input ends
HOLDER = """
import sys
from pathlib import Path
from mmgcp.utils.folders import work_dir
with work_dir(Path(sys.argv[1])):
    print('ready', flush=True)
    sys.stdin.read()
"""


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def fill(folder, text, names=RESULTS[:2]):
    for name in names:
        (folder / name).write_text(f'{text} {name}')


@pytest.fixture
def out(tmp_path):
    """A folder with old results, and other things."""
    folder = tmp_path / 'out'
    (folder / 'kept' / 'deep').mkdir(parents=True)
    (folder / 'kept' / 'deep' / 'log.txt').write_text('log')
    (folder / 'notes.txt').write_text('mine')
    (folder / 'link').symlink_to('notes.txt')
    fill(folder, 'old', RESULTS)
    folder.chmod(0o751)
    return folder


def assert_others(folder):
    assert (folder / 'kept' / 'deep' / 'log.txt').read_text() == 'log'
    assert (folder / 'notes.txt').read_text() == 'mine'
    assert os.readlink(str(folder / 'link')) == 'notes.txt'
    assert folder.stat().st_mode & 0o777 == 0o751


@pytest.mark.parametrize('exchange', ['folders', 'files', 'mounted', 'cwd'])
def test_results_are_replaced(out, monkeypatch, exchange):
    """Those that are not written again go, everything else stays."""
    if exchange == 'files':
        monkeypatch.setattr(folders, '_exchange_folders', lambda *_: False)
    elif exchange == 'mounted':
        monkeypatch.setattr(os.path, 'ismount', lambda _: True)
    elif exchange == 'cwd':
        monkeypatch.chdir(out / 'kept')
    with work_dir(out) as folder, replacing_results(folder, RESULTS) as new:
        fill(new, 'new')
        assert new != out and contents(out)['a.txt'] == 'old a.txt'
    assert contents(out) == {'a.txt': 'new a.txt', 'b.txt': 'new b.txt', 'notes.txt': 'mine',
                             'link': 'mine'}
    assert_others(out)
    assert [path.name for path in out.parent.iterdir()] == ['out']


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux exchanges folders')
def test_folders_are_exchanged_in_one_step(out, monkeypatch):
    monkeypatch.setattr(folders, '_exchange_files', lambda *_: pytest.fail('one by one'))
    with work_dir(out) as folder, replacing_results(folder, RESULTS) as new:
        fill(new, 'new')
    assert contents(out)['a.txt'] == 'new a.txt'


def test_what_is_written_meanwhile_stays(out, monkeypatch):
    link = folders._link_others

    def late(old, new, results):
        link(old, new, results)
        (old / 'late.txt').write_text('late')

    monkeypatch.setattr(folders, '_link_others', late)
    with work_dir(out) as folder, replacing_results(folder, RESULTS) as new:
        fill(new, 'new')
    assert contents(out)['late.txt'] == 'late' and contents(out)['a.txt'] == 'new a.txt'


@pytest.mark.parametrize('number', [0, 1, 2])
@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_failure_replaces_nothing(out, number, error):
    before = contents(out)
    with pytest.raises(error):
        with work_dir(out) as folder, replacing_results(folder, RESULTS) as new:
            fill(new, 'new', RESULTS[:number])
            raise error
    assert contents(out) == before
    assert_others(out)
    assert [path.name for path in out.parent.iterdir()] == ['out']


@pytest.mark.parametrize('missing', ['a', 'a/b/c'])
def test_folder_that_is_made(tmp_path, missing):
    """It stays if something was written, and goes, with those above it, if nothing was."""
    folder = tmp_path / missing
    with pytest.raises(KeyError), work_dir(folder) as made:
        assert made == folder and folder.is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with work_dir(folder):
        (folder / 'a.txt').touch()
    assert [path.name for path in folder.iterdir()] == ['a.txt']


@pytest.mark.parametrize('where', ['out', 'file/out', 'file/deep/out'])
def test_file_in_its_place(tmp_path, where):
    (tmp_path / where.split('/')[0]).write_text('mine')
    with pytest.raises(UserError, match='is a file, not a folder to write to'):
        with work_dir(tmp_path / where):
            pytest.fail('begun')
    assert contents(tmp_path) == {where.split('/')[0]: 'mine'}


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may write anywhere')
def test_folder_without_rights(tmp_path):
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / 'out'):
        with pytest.raises(UserError, match='cannot be written to: Permission denied'):
            with work_dir(folder):
                pytest.fail('begun')
    tmp_path.chmod(0o700)


@root_only
@pytest.mark.parametrize('settings, size, reason', [
    ('ro', 0, 'Read-only file system'), ('size=64k', 1 << 20, 'No space left on device')])
def test_disk_that_cannot_be_written_to(tmp_path, settings, size, reason):
    with small_disk(tmp_path / 'disk', settings) as disk:
        for folder in (disk, disk / 'deep' / 'out'):
            with pytest.raises(UserError) as caught, work_dir(folder, size):
                pytest.fail('begun')
            assert str(caught.value) == f'{folder} cannot be written to: {reason}'
        assert list(disk.iterdir()) == []


@root_only
def test_mounted_folder(tmp_path):
    """It cannot be exchanged."""
    with small_disk(tmp_path / 'disk', 'size=1m') as disk:
        for text in ('old', 'new'):
            with work_dir(disk) as folder, replacing_results(folder, RESULTS) as new:
                fill(new, text)
        assert contents(disk) == {'a.txt': 'new a.txt', 'b.txt': 'new b.txt'}


@root_only
def test_disk_that_gets_full(tmp_path):
    """The old results stay."""
    with small_disk(tmp_path / 'disk', 'size=64k') as disk:
        with work_dir(disk / 'out') as folder, replacing_results(folder, RESULTS) as new:
            fill(new, 'old')
        with pytest.raises(OSError, match='No space left'):
            with work_dir(disk / 'out') as folder, replacing_results(folder, RESULTS) as new:
                fill(new, 'new')
                (new / 'c.txt').write_bytes(bytes(1 << 20))
        assert contents(disk / 'out') == {'a.txt': 'old a.txt', 'b.txt': 'old b.txt'}
        assert [path.name for path in disk.iterdir()] == ['out']


def test_leftovers_of_killed_runs_are_deleted(out):
    (out / '.unwritten-abcd1234').write_text('half')
    (out / '.123-unfinished.pth').write_text('half')
    aside = out.parent / '.out.unwritten-abcd1234' / 'out'
    aside.mkdir(parents=True)
    other = out.parent / '.other.unwritten-abcd1234'
    other.mkdir()
    with work_dir(out):
        assert not aside.parent.exists() and other.exists()
        assert {path.name for path in out.iterdir()} == {
            '.lock', 'kept', 'link', 'notes.txt', *RESULTS}
    assert not (out / '.lock').exists()


@pytest.fixture
def holder(out):
    """Another process that works in the folder."""
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', HOLDER, str(out)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=environment(dict(PYTHONPATH=str(ROOT))))
    assert process.stdout.readline() == 'ready\n'
    yield process
    process.kill()
    process.communicate()


locks = pytest.mark.skipif(folders.fcntl is None, reason='nothing is locked on Windows')


@locks
def test_second_run(out, holder, monkeypatch):
    """It is told who works there, and may work there when that has ended, however it does."""
    record = json.loads((out / '.lock').read_text())
    assert record['pid'] == holder.pid
    with pytest.raises(UserError) as caught, work_dir(out):
        pytest.fail('begun')
    assert str(caught.value) == (
        f'another run works in {out}: `{record["command"]}`, process {holder.pid} on '
        f'{record["host"]}, since {record["since"]}; wait for its end, end it, or choose another '
        'folder')
    assert (out / '.lock').exists()
    holder.kill()
    holder.wait()
    assert (out / '.lock').exists()
    with work_dir(out):
        assert json.loads((out / '.lock').read_text())['pid'] == os.getpid()
    assert not (out / '.lock').exists()


@locks
def test_lock_stays_when_results_are_replaced(out, monkeypatch):
    """Another process would not get it."""
    with work_dir(out) as folder:
        with replacing_results(folder, RESULTS) as new:
            fill(new, 'new')
        monkeypatch.setattr(sys, 'argv', ['x'])
        code = HOLDER.replace("print('ready', flush=True)", 'pass')
        result = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code, str(out)], input='', text=True,
            stderr=subprocess.PIPE, env=environment(dict(PYTHONPATH=str(ROOT))))
        assert f'process {os.getpid()} on ' in result.stderr


@locks
def test_twice_in_one_process(out):
    with work_dir(out):
        with pytest.raises(UserError, match='works in .* already'), work_dir(out):
            pytest.fail('begun')


@locks
@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": 1}'])
def test_lock_that_nobody_holds(out, text):
    (out / '.lock').write_text(text)
    with work_dir(out):
        pass
    assert not (out / '.lock').exists()


@locks
def test_file_system_without_locks(out, monkeypatch):
    def fail(*_):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(folders.fcntl, 'lockf', fail)
    with pytest.warns(UserWarning, match='cannot be locked'), work_dir(out):
        pass


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux exchanges folders')
@pytest.mark.parametrize('exchange', ['folders', 'files'])
def test_killed_at_each_step(out, exchange):
    """Whatever the moment, the folder has the old results, or the new ones, and a run can follow.

    The process forks before each attempt, and is killed at the next event of the file system.
    Where folders cannot be exchanged, results may be missing, but never those of two runs mixed.
    """
    code = (ROOT / 'tests' / 'faults.py').read_text() + '''
from mmgcp.utils import folders
from mmgcp.utils.folders import replacing_results, work_dir

if sys.argv[2] == 'files':
    folders._exchange_folders = lambda *_: False

def work(text):
    with work_dir(Path(sys.argv[1])) as folder:
        with replacing_results(folder, ('a.txt', 'b.txt', 'c.txt')) as new:
            for name in ('a.txt', 'b.txt'):
                (new / name).write_text(f'{text} {name}')

seen = set()
for number in range(1, 1000):
    work('old')
    killed = killed_at(number, lambda: work('new'))
    found = {path.name: path.read_text() for path in Path(sys.argv[1]).iterdir()
             if path.name in ('a.txt', 'b.txt', 'c.txt')}
    texts = {value.split()[0] for value in found.values()}
    assert len(texts) <= 1, (number, found)
    text = (list(texts) or ['none'])[0]
    if sys.argv[2] == 'folders':
        assert found == {name: f'{text} {name}' for name in ('a.txt', 'b.txt')}, (number, found)
    seen.add((killed, text))
    if not killed:
        break
work('new')
print(number, sorted(seen))
'''
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(out), exchange],
                            text=True, capture_output=True,
                            env=environment(dict(PYTHONPATH=str(ROOT))))
    assert result.returncode == 0, result.stderr[-3000:]
    number, seen = result.stdout.split(maxsplit=1)
    assert int(number) > 20
    between = "(True, 'none'), " * (exchange == 'files')
    assert seen.strip() == f"[(False, 'new'), (True, 'new'), {between}(True, 'old')]"
    assert_others(out)
    assert [path.name for path in out.parent.iterdir()] == ['out']
