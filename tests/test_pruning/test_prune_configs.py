# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of criteria: do they load, and is what they say complete?"""
import inspect
import runpy

import pytest
from mmengine.registry import DefaultScope
from pruning_samples import ROOT

from mmgcp.pruning.scores import Criterion
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import load_config

CRITERIA = dict(bn_scale='BNScale', l1_norm='L1Norm', l2_norm='L2Norm', fpgm='FPGM', apoz='APoZ',
                taylor='Taylor', fisher='GroupFisher', random='Random')
PAIRS = [(detector, name) for detector in ('yolov4_voc', 'yolov5_s_coco') for name in CRITERIA]
TOOL = runpy.run_path(str(ROOT / 'tools/prune.py'))


@pytest.fixture(params=PAIRS, ids='_'.join)
def path(request):
    return ROOT / 'configs/prune' / '{}_{}.py'.format(*request.param)


def test_criterion(path):
    """It is the one of the name, with all of its options spelled out."""
    config = load_config(str(path)).prune_cfg.criterion.to_dict()
    detector, name = next(pair for pair in PAIRS if path.stem == '_'.join(pair))
    assert config['type'] == f'mmgcp.{CRITERIA[name]}'
    with DefaultScope.overwrite_default_scope('mmyolo'):
        criterion = TASK_UTILS.build(dict(config))
    assert isinstance(criterion, Criterion)
    parameters = inspect.signature(type(criterion)).parameters.values()
    assert {option: value for option, value in config.items() if option != 'type'} == {
        parameter.name: parameter.default for parameter in parameters}


def test_command(path, monkeypatch):
    """The head of the config names a command that understands it."""
    command = path.read_text().splitlines()[1]
    words = command.lstrip('# ').split()
    assert words[:3] == ['python', 'tools/prune.py', f'configs/prune/{path.name}']
    monkeypatch.setattr('sys.argv', [words[1], *words[2:]])
    args = TOOL['parse_args']()
    cfg = load_config(str(path))
    options = TOOL['pruning_options'](cfg, args)
    budgets = [options.get(name) for name in ('target_params', 'target_flops')]
    assert budgets == ([0.353, 0.651] if 'yolov4' in path.name else [None, 0.5])
    assert ('groups' in options) == ('yolov4' in path.name)
    needs = TASK_UTILS.build(dict(options['criterion'])).needs
    assert args.calib_batches == (16 if needs else 4)


def test_training_data(path):
    """They can be loaded: MMEngine cannot call a function whose config has a scope."""
    cfg = load_config(str(path))
    assert cfg.train_dataloader.collate_fn == dict(type='yolov5_collate')
    assert 'mmgcp' in cfg.custom_imports.imports


def test_there_is_one_for_each_criterion():
    names = {path.stem for path in (ROOT / 'configs/prune').glob('*.py')}
    assert names >= {'_'.join(pair) for pair in PAIRS}
