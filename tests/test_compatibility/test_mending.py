# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Other packages are changed when a class of mmgcp is first used, and never by the import."""
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from scripts import ROOT, run_code
from tiny_runner import tiny_runner

from mmgcp.compatibility import mend_openmmlab, version_number

NEEDS_MENDING = version_number(torch.__version__) >= (2, 6, 0)

STATE = """
import torch, mmdet, mmyolo
from mmdet.models.dense_heads import SSDHead

def foreign_globals():
    if not hasattr(torch.serialization, 'get_safe_globals'):
        return []
    pairs = [item if isinstance(item, tuple) else (item, item.__module__)
             for item in torch.serialization.get_safe_globals()]
    return [name for _, name in pairs if not name.startswith('torch.')]

def state():
    return foreign_globals(), hasattr(SSDHead, 'loss_cls')

before = state()
"""


def run_python(code, *arguments):
    """Run code in a fresh process and return what it prints."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    result = run_code(code, *arguments, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_mmgcp_changes_nothing_else():
    code = STATE + """
import mmgcp, mmgcp.pipeline, mmgcp.darknet, mmgcp.analysis
assert state() == before == ([], False), state()
"""
    assert 'mended' not in run_python(code)


@pytest.mark.parametrize('use', [
    "mmengine.registry.HOOKS.build(dict(type='mmgcp.DynamicSparsityHook'))",
    "mmgcp.utils.checkpoint.read_checkpoint(write_checkpoint())",
])
def test_the_first_use_mends_and_is_logged_once(use):
    code = STATE + f"""
import tempfile, mmengine, mmgcp, mmgcp.utils.checkpoint

def write_checkpoint():
    path = tempfile.NamedTemporaryFile(suffix='.pth', delete=False).name
    torch.save(dict(), path)
    return path

{use}
{use}
names, predicts = state()
assert predicts and ('builtins.getattr' in names) == {NEEDS_MENDING}, names
"""
    assert run_python(code).count('mmgcp has mended other packages') == 1


def test_runner_resumes_with_a_hook_of_mmgcp(tmp_path):
    """As MMYOLO's own train.py does: nobody calls mend_openmmlab()."""
    first = tiny_runner(tmp_path)
    first.train()
    code = """
import sys
from tiny_runner import tiny_runner
import mmgcp
folder = sys.argv[1]
runner = tiny_runner(folder, [dict(type='mmgcp.DynamicSparsityHook', histogram_interval=0)],
                     resume=True, load_from=f'{folder}/epoch_1.pth')
runner.train()
print('iterations', runner.iter)
"""
    output = run_python(code, tmp_path)
    assert 'iterations 4' in output and 'Epoch(train) [2]' in output
    assert 'Epoch(train) [1]' not in output


def test_ssd_predicts():
    """Heads that have a loss keep theirs."""
    from mmdet.models.dense_heads import RetinaHead, SSDHead
    mend_openmmlab()
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = SSDHead(num_classes=2, in_channels=(4, ), anchor_generator=dict(
            type='SSDAnchorGenerator', scale_major=False, input_size=300, strides=[8],
            ratios=[[2]], min_sizes=[30], max_sizes=[60]), test_cfg=ConfigDict(
                nms_pre=10, nms=dict(type='nms', iou_threshold=0.45), score_thr=0.02,
                max_per_img=5))
        other = RetinaHead(num_classes=2, in_channels=4)
    meta = dict(img_shape=(32, 32), scale_factor=(1., 1.))
    found, = head.predict_by_feat(*head((torch.rand(1, 4, 4, 4), )), batch_img_metas=[meta])
    assert 0 < len(found) <= 5 and other.loss_cls is not None
