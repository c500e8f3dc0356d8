# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""`make env` with programs that only act as Python and pip: what it says, and where it fails."""
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = '''#!{python}
"""Acts as python and pip; each call is a line of calls.txt."""
import pathlib, shutil, subprocess, sys, tarfile, time
given, home = sys.argv[1:], pathlib.Path(__file__).parent
with open('{folder}/calls.txt', 'a') as file:
    file.write(' '.join(given).replace(chr(10), ' ') + chr(10))
if given[:2] == ['-m', 'venv']:
    target = pathlib.Path(given[2], 'bin')
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, target / 'python')
elif given[0] == '-c':
    if 'platform' in given[1]:
        print('cp311-torch2.13.0-test')
    # Only what has been installed has a stack
    sys.exit('mmcv.ops' in given[1] and home.name == 'fakes')
elif given[:3] == ['-m', 'pip', 'install']:
    print('Collecting ' + given[-1])
    print('  Downloading https://example.org/one/package-1.whl (191.4 MB)', flush=True)
    time.sleep({install})
elif given[:3] == ['-m', 'pip', 'download']:
    sources = pathlib.Path(given[given.index('-d') + 1])
    (sources / 'setup.py').write_text("args = ['-std=c++14']")
    with tarfile.open(sources / 'mmcv-2.0.1.tar.gz', 'w:gz') as archive:
        archive.add(sources / 'setup.py', 'mmcv-2.0.1/setup.py')
elif given[:3] == ['-m', 'pip', 'wheel']:
    assert 'c++17' in pathlib.Path(given[-1], 'setup.py').read_text()
    for number in range(1, 5):
        print(f'  [{{number}}/77] c++ -c nms.cpp', flush=True)
        time.sleep({build})
    if {fails}:
        sys.exit('nms.cpp:7: error: expected a semicolon')
    out = pathlib.Path(given[given.index('-w') + 1])
    out.mkdir()
    (out / 'mmcv-2.0.1-test.whl').write_text('')
'''


@pytest.fixture
def make_env(tmp_path):
    """Runs the script where nothing is installed; returns what it says, and the calls."""

    def run(install=0., build=0., fails=False, check=True):
        fakes = tmp_path / 'fakes'
        fakes.mkdir(exist_ok=True)
        for name in ('python', 'python3', 'python3.11'):
            (fakes / name).write_text(PYTHON.format(python=sys.executable, folder=tmp_path,
                                                    install=install, build=build, fails=fails))
            (fakes / name).chmod(stat.S_IRWXU)
        (tmp_path / 'calls.txt').write_text('')
        environ = {name: value for name, value in os.environ.items() if name != 'PYTHON'}
        environ.update(PATH=f'{fakes}:{environ["PATH"]}', XDG_CACHE_HOME=str(tmp_path / 'cache'),
                       TELL_EVERY='1')
        done = subprocess.run(
            [str(ROOT / 'tools/environment/make_env.sh'), str(tmp_path / 'venv')], env=environ,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert (done.returncode == 0) == check, done.stdout
        return done.stdout, (tmp_path / 'calls.txt').read_text().splitlines()

    return run


def test_says_each_step_and_how_far_the_compiler_is(make_env, tmp_path):
    said, calls = make_env(build=0.8)
    steps = [line.split()[1] for line in said.splitlines() if '/6 ' in line]
    assert list(dict.fromkeys(steps)) == [f'{number}/6' for number in range(1, 7)]
    told = [line for line in said.splitlines() if 'of 77 files compiled' in line]
    assert told and all(line.startswith('[env]     after ') for line in told)
    log = tmp_path / 'venv' / 'make_env.log'
    assert f'what pip and the compiler say goes to {log}' in said
    assert '[4/77] c++' in log.read_text() and 'c++' not in said
    assert said.splitlines()[-1] == (
        f'[env] {tmp_path / "venv"} is ready: source {tmp_path / "venv"}/bin/activate')
    assert calls.count('-m pip install --no-deps -e .') == 1


def test_says_what_pip_is_at(make_env):
    said, _ = make_env(install=1.6)
    assert 'after 1 s: Downloading package-1.whl (191.4 MB)' in said


def test_a_wheel_is_built_once(make_env, tmp_path):
    def builds(calls):
        return sum(call.startswith('-m pip wheel') for call in calls)

    assert builds(make_env()[1]) == 1
    assert make_env() == ('', [])  # all is there
    for stamp in (tmp_path / 'venv').glob('.mmgcp-*'):
        stamp.unlink()
    said, calls = make_env()
    assert builds(calls) == 0 and 'building' not in said


def test_a_failure_names_the_log(make_env, tmp_path):
    said, calls = make_env(fails=True, check=False)
    last = said.splitlines()[-1]
    assert last.startswith('[env] FAILED: 4/6 building mmcv 2.0.1')
    assert last.endswith(f'The whole output is in {tmp_path / "venv" / "make_env.log"}')
    assert 'nms.cpp:7: error: expected a semicolon' in said
    assert 'ready' not in said and not list((tmp_path / 'venv').glob('.mmgcp-*'))
    assert '-m pip install --no-deps -e .' not in calls  # nothing after it
