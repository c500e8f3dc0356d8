# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The tutorial, followed to the letter but for the number of epochs and the size of the data."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'tutorial.md').read_text()
EPOCHS = re.compile(r'(?<=max_epochs=)\d+|(?<=epoch_)\d+')


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', PAGE, re.S)


@pytest.mark.slow
def test_tutorial(tmp_path):
    for name in ('tools', 'configs', 'mmgcp'):
        (tmp_path / name).symlink_to(ROOT / name)
    detector, distilled = (EPOCHS.sub('1', text) for text in blocks('python'))
    (tmp_path / 'my_detector.py').write_text(detector)
    (tmp_path / 'distilled.py').write_text(distilled)
    commands = [line for text in blocks('shell') for line in text.splitlines()]
    assert len(commands) >= 9 and all(line.startswith('python tools/') for line in commands)
    environment = dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1')
    for line in commands:
        command = EPOCHS.sub('1', line).split()[1:]
        if 'make_demo_dataset' in line:
            command += ['--num-train', '8', '--num-val', '4', '--num-test', '4']
        elif 'train.py' in line:  # the last iteration would otherwise be of the whole schedule
            if '--cfg-options' not in command:
                command += ['--cfg-options', 'train_cfg.max_epochs=1',
                            'default_hooks.param_scheduler.max_epochs=1']
            command += ['default_hooks.checkpoint.interval=1', 'train_cfg.val_interval=1']
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f'{line}\n{done.stdout[-3000:]}'
    assert (tmp_path / 'detector.onnx').is_file() and (tmp_path / 'pruned/report.md').is_file()
