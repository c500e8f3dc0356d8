# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import sys

import pytest

from mmgcp.errors import UserError
from mmgcp.pipeline.tool_runner import ToolRunner

TRAIN = ('11/22 05:49:42 - mmengine - INFO - Epoch(train)  [1][10/19]  base_lr: 1.0000e-02 '
         'lr: 1.5789e-03  eta: 2:10:26  time: 6.9257  data_time: 0.1138  loss: 2.9560  '
         'loss_cls: 0.6117  loss_obj: 0.7684  loss_bbox: 1.5759')
TRAIN_LONG = ('11/22 05:49:42 - mmengine - INFO - Epoch(train)  [12][ 150/1019]  base_lr: 1.0e-02 '
              'lr: 1.5789e-03  eta: 1 day, 2:10:26  time: 6.9257  data_time: 0.1138  memory: 7041  '
              'grad_norm: 3.1  loss: 12.9560  loss_cls: 0.6117  loss_attention: 10.7684')
VAL = ('11/22 05:57:07 - mmengine - INFO - Epoch(val) [10][9/9]    pascal_voc/mAP: 0.0523  '
       'pascal_voc/AP50: 0.1610  data_time: 0.0281  time: 0.4697')
VAL_PROGRESS = ('11/22 05:57:03 - mmengine - INFO - Epoch(val)  [10][5/9]    eta: 0:00:02  '
                'time: 0.5  data_time: 0.03  ')
TEST = ('11/22 05:57:07 - mmengine - INFO - Epoch(test) [9/9]    coco/bbox_mAP: 0.5020  '
        'coco/bbox_mAP_50: 0.6900  data_time: 0.0281  time: 0.4697')
TABLE = '| RBC   | 367 | 3700  | 0.512  | 0.161 |'
BEST = ('11/22 05:57:08 - mmengine - INFO - The best checkpoint with 0.0523 pascal_voc/mAP at 10 '
        'epoch is saved to best_pascal_voc_mAP_epoch_10.pth.')


@pytest.fixture
def runner(tmp_path):
    """A runner with tools that are said in the test."""
    for folder in ('tools', 'work'):
        (tmp_path / folder).mkdir()
    return ToolRunner(tmp_path / 'tools', tmp_path / 'work')


def write_tool(runner, name, lines=(), code=''):
    text = ''.join(f'print({line!r})\n' for line in lines)
    (runner.tools_dir / name).write_text(f'import sys\n{text}{code}\n')


def test_progress_of_training(runner, capfd):
    lines = ['System environment:', TRAIN, TRAIN_LONG, VAL_PROGRESS, TABLE, VAL, BEST]
    write_tool(runner, 'train.py', lines)
    runner.run('baseline', 'train.py', 'a.py', '--work-dir', 'b')
    output = capfd.readouterr()
    assert output.out.splitlines() == [
        '[baseline] train.py a.py --work-dir b',
        '[baseline] epoch 1 iteration 10/19 loss 2.9560 eta 2:10:26',
        '[baseline] epoch 12 iteration 150/1019 loss 12.9560 eta 1 day, 2:10:26',
        '[baseline] val pascal_voc/mAP: 0.0523 pascal_voc/AP50: 0.1610',
    ]
    assert not output.err
    log = runner.folder / 'baseline' / 'log.txt'
    assert log.read_text().splitlines() == lines


def test_progress_of_testing(runner, capfd):
    write_tool(runner, 'test.py', [TABLE, TEST])
    runner.run('sparse', 'test.py')
    assert capfd.readouterr().out.splitlines()[1:] == [
        '[sparse] test coco/bbox_mAP: 0.5020 coco/bbox_mAP_50: 0.6900']


def test_other_tools_are_shown_as_they_are(runner, capfd):
    write_tool(runner, 'prune.py', ['first', '  second'], "print('third', file=sys.stderr)")
    runner.run('prune', 'prune.py')
    shown = capfd.readouterr().out.splitlines()[1:]
    assert sorted(shown) == ['[prune]   second', '[prune] first', '[prune] third']


def test_log_goes_on(runner):
    """The log of a stage that is resumed is kept."""
    for line in ('first', 'second'):
        write_tool(runner, 'train.py', [line])
        runner.run('baseline', 'train.py')
    log = runner.folder / 'baseline' / 'log.txt'
    assert log.read_text().splitlines() == ['first', 'second']


@pytest.mark.parametrize('code, last', [
    ("sys.exit('train.py: there is no config a.py')", 'train.py: there is no config a.py'),
    ("print('reason', file=sys.stderr)\nprint()\nsys.exit(3)", 'reason'),
    ("raise RuntimeError('a bug')", 'RuntimeError: a bug'),
])
def test_failure(runner, code, last):
    write_tool(runner, 'train.py', ['before'], code)
    with pytest.raises(UserError) as caught:
        runner.run('sparse', 'train.py')
    log = runner.folder / 'sparse' / 'log.txt'
    assert str(caught.value) == (
        f'train.py failed in stage sparse: {last} (whole output: {log})')
    assert log.read_text().startswith('before\n') and last in log.read_text()


def test_arguments_and_metrics(runner):
    code = """
import json, pathlib
config, checkpoint, option, work_dir = sys.argv[1:]
assert option == '--work-dir'
folder = pathlib.Path(work_dir)
folder = folder / str(len(list(folder.glob('*')))) if folder.exists() else folder / '0'
folder.mkdir(parents=True)
text = json.dumps(dict(mAP=0.5, files=[config, checkpoint, folder.name]))
(folder / 'metrics.json').write_text(text)
"""
    write_tool(runner, 'test.py', code=code)
    assert runner.test('baseline', 'a b.py', 'c.pth') == dict(
        mAP=0.5, files=['a b.py', 'c.pth', '0'])
    # again: the new metrics, not those of before
    assert runner.test('baseline', 'd.py', 'e.pth') == dict(mAP=0.5, files=['d.py', 'e.pth', '1'])
    assert json.loads((runner.folder / 'baseline/test/1/metrics.json').read_text())['mAP'] == 0.5


def test_no_metrics(runner):
    write_tool(runner, 'test.py', [TEST])
    with pytest.raises(UserError, match='test.py wrote no metrics in stage pruned'):
        runner.test('pruned', 'a.py', 'b.pth')


PARSER = """
import argparse

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument('--number', type=int)
    return parser.parse_args()
"""


def test_parse(runner):
    """Without running the tool, and without a change to this process."""
    write_tool(runner, 'tool.py', code=PARSER)
    before = list(sys.argv)
    assert runner.parse('tool.py', '--number', '3').number == 3
    for arguments, reason in ((['--number', 'a b'], "invalid int value: 'a b'"),
                              (['--other'], 'unrecognized arguments: --other')):
        with pytest.raises(UserError, match=reason) as caught:
            runner.parse('tool.py', *arguments)
        assert str(caught.value).startswith('tool.py does not take --')
    assert sys.argv == before
