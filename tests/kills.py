# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Kill tools at seeded moments: earlier results stay usable, a rerun completes, none is left.

python tests/kills.py prune --points 50; also: compress, compress-alone (the parent, not its
tools), train. A run takes minutes to hours; tests/test_tools/test_kills.py has a few points.
"""
import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import mmengine.config.config
from faults import kill_at
from mmengine.config import Config
from scripts import ROOT, TOOLS, environment, write_pruning_files
from yolov4_samples import config_text_with_data

from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.checkpoint_files import newest_checkpoint
from mmgcp.utils.config import build_detector

LINGER = 20  # seconds after which workers of data loaders must have noticed the end
SPARSE = """
custom_hooks = [dict(type='mmgcp.DynamicSparsityHook', rate=1e-3, modules='prunable')]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
train_cfg = dict(max_epochs={epochs}, val_interval=100)
train_dataloader = dict(num_workers=1)
"""


class Run:
    """A tool that is running in a session of its own, with all that it prints in a file.

    It is a copy of this process, which has imported everything, that runs the tool.

    Args:
        folder (Path): The working directory.
        tool (str): The tool.
        *arguments: Its arguments.
        number (int, optional): It is killed at its event of this number that names a path with
            the text ``within``.
    """

    def __init__(self, folder, tool, *arguments, number=None, within=''):
        self.log = folder / 'output.txt'
        self.log.write_text('')
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            os.setsid()
            os.chdir(str(folder))
            output = os.open(str(self.log), os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.environ.update(environment(dict(PYTHONPATH=str(ROOT))))
            sys.argv[:] = [str(TOOLS / tool), *map(str, arguments)]
            if number is not None:
                kill_at(number, within)
            os._exit(run_script())

    def poll(self):
        """Its status, or None while it is running."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status

    def ends(self, seconds=600):
        """Whether it ends in time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.poll() is not None

    def kill(self, alone=False, number=signal.SIGKILL):
        """Kill it, with the processes that it has started or alone; check that none is left."""
        if self.poll() is None:
            (os.kill if alone else os.killpg)(self.pid, number)
        assert self.ends()
        self.check_ended()

    def wait_for(self, text, seconds=300):
        """Wait until it has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def ends_before(self, lines):
        """Wait until it has printed so many lines; whether it has ended before that."""
        while self.log.read_text().count('\n') < lines and self.poll() is None:
            time.sleep(0.05)
        return self.poll() is not None

    def complete(self):
        """Wait for its end, which has to be a good one; return what it has printed."""
        assert self.ends() and self.status == 0, self.log.read_text()[-3000:]
        self.check_ended()
        return self.log.read_text()

    def check_ended(self):
        """Check that soon none of the processes of its session is left."""
        deadline = time.monotonic() + LINGER
        while self.processes():
            assert time.monotonic() < deadline, f'left: {self.processes()}'
            time.sleep(0.1)

    def processes(self):
        """The commands of its processes that are running."""
        found = []
        for folder in Path('/proc').glob('[0-9]*'):
            try:
                state, _, _, session = (folder / 'stat').read_text().rpartition(')')[2].split()[:4]
                if int(session) == self.pid and state not in 'ZX':
                    found.append((folder / 'cmdline').read_bytes().replace(b'\0', b' ').decode())
            except OSError:  # it has ended just now
                continue
        return found


def run_script():
    """Run the script that sys.argv names in this process; return its status."""
    mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # which takes long
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code)
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    return status


def check_pruned(folder):
    """Check that all files of a pruned detector are of one run; return its share of parameters."""
    cfg = Config.fromfile(folder / 'pruned.py')
    model = build_detector(cfg)
    load_strictly(model, str(folder / 'pruned.pth'))
    report, plan = (json.loads((folder / f'{name}.json').read_text()) for name in
                    ('report', 'plan'))
    params = sum(param.numel() for param in model.parameters())
    assert report['params']['after'] == params
    assert report['options'] == plan['options']
    return plan['options']['target_params']


class PruneKills:
    """tools/prune.py into a folder that has earlier results."""

    def __init__(self, folder, config):
        self.folder, self.out = folder, folder / 'out'
        self.files = write_pruning_files(config)
        self.shares = [0.5, 0.7]  # of the earlier run, and of the one that is killed
        began = time.monotonic()
        self.run(self.shares[0]).complete()
        self.seconds = time.monotonic() - began
        self.seen = []

    def run(self, share, number=None):
        return Run(self.folder, 'prune.py', *self.files, '--work-dir', self.out, '--target-params',
                   share, '--calib-batches', 1, '--input-size', 96, 96, number=number,
                   within=str(self.folder / '.out'))

    def point(self, draw):
        """Kill it at an event in the folder that is written, or at any time."""
        if draw.random() < 0.5:
            run = self.run(self.shares[1], draw.randint(1, 40))
            assert run.ends()
        else:
            run = self.run(self.shares[1])
            time.sleep(draw.uniform(0, self.seconds))
            run.kill()
        self.seen.append(check_pruned(self.out))
        assert self.seen[-1] in self.shares

    def finish(self):
        self.run(self.shares[1]).complete()
        assert check_pruned(self.out) == self.shares[1]
        assert not [path.name for path in (*self.out.iterdir(), *self.out.parent.iterdir())
                    if path.name.startswith('.')]
        self.shares.reverse()


class CompressKills:
    """tools/compress.py with all its tools, or alone."""

    def __init__(self, folder, config, alone=False):
        self.folder, self.alone = folder, alone
        self.config, self.data = config, folder / 'data'
        self.count, self.seen = 0, []

    @property
    def out(self):
        return self.folder / f'compressed-{self.count}'

    def run(self):
        return Run(self.folder, 'compress.py', self.config, '--work-dir', self.out, '--data',
                   self.data, '--target-params', 0.5, '--prune-options', '--calib-batches 1')

    def point(self, draw):
        """Kill it when it has gone on for a while; begin anew when it has finished."""
        run = self.run()
        # About as many lines as two stages print, so that it does not depend on the machine
        if run.ends_before(draw.randint(1, 2500)) or run.ends(draw.uniform(0, 3)):
            self.finish()
        else:
            run.kill(self.alone)
            self.seen.append(self.check())

    def check(self):
        """What is said to be finished is there; return the last step."""
        state = self.out / 'state.json'
        steps = json.loads(state.read_text()) if state.exists() else {}
        done = [name for name, step in steps.items() if 'result' in step]
        for name in done:
            if name.startswith('train '):
                stage = name.split()[1]
                assert newest_checkpoint(self.out / stage).endswith('epoch_1.pth')
            elif name == 'prune':
                check_pruned(self.out / 'pruned')
        return (done or ['nothing'])[-1]

    def finish(self):
        self.run().complete()
        stages = json.loads((self.out / 'summary.json').read_text())['stages']
        assert [row['stage'] for row in stages] == ['baseline', 'sparse', 'pruned', 'distilled']
        left = list(self.out.rglob('.*'))
        assert not left, left
        self.count += 1


class TrainKills:
    """A sparse training that keeps a single checkpoint."""

    def __init__(self, folder, config, epochs=8):
        self.folder, self.out, self.epochs = folder, folder / 'trained', epochs
        self.config = folder / 'sparse.py'
        self.config.write_text(f'_base_ = {str(config)!r}\n' + SPARSE.format(epochs=epochs))
        self.seen = []

    def run(self):
        """Go on; begin anew where the only checkpoint is half-written, which the tool refuses."""
        try:
            newest_checkpoint(self.out)
            options = ['--resume']
        except UserError:
            options = []
        return Run(self.folder, 'train.py', self.config, '--work-dir', self.out, *options)

    def point(self, draw):
        run = self.run()
        # It prints the config and its hooks in about 1100 lines, and then trains in 60
        run.ends_before(draw.randint(1, 1180) if draw.random() < 0.2 else draw.randint(1100, 1180))
        run.ends(draw.uniform(0, 0.5))
        run.kill()
        self.seen.append(self.last_epoch())
        if self.seen[-1] == self.epochs:
            self.finish()

    def last_epoch(self):
        epochs = sorted(int(path.stem.split('_')[1]) for path in self.out.glob('epoch_*.pth'))
        return (epochs or [0])[-1]

    def finish(self):
        self.run().complete()
        assert newest_checkpoint(self.out) == str(self.out / f'epoch_{self.epochs}.pth')
        assert not [path for path in self.out.iterdir() if path.name.startswith('.')]
        shutil.rmtree(str(self.out))


def make(kind, folder):
    """Make what is killed, in a folder that exists."""
    folder = Path(folder)
    make_demo_dataset(folder / 'data', DemoOptions(num_train=4, num_val=2, num_test=2, size=128,
                                                   seed=3))
    config = folder / 'tiny.py'
    config.write_text(config_text_with_data(folder / 'data', CLASSES))
    if kind == 'prune':
        return PruneKills(folder, config)
    if kind == 'train':
        return TrainKills(folder, config)
    return CompressKills(folder, config, alone=kind == 'compress-alone')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('kind', choices=('prune', 'compress', 'compress-alone', 'train'))
    parser.add_argument('--points', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--finish-every', type=int, default=5,
                        help='let the tool end after so many points')
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        kills = make(args.kind, folder)
        for number in range(1, args.points + 1):
            kills.point(draw)
            print(f'point {number}: {kills.seen[-1:]}', flush=True)
            if number % args.finish_every == 0 or number == args.points:
                kills.finish()
    print(f'{args.kind}: {args.points} points, seed {args.seed}: all well')


if __name__ == '__main__':
    main()
