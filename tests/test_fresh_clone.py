# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""All configs on a fresh clone, before anything has been trained or pruned."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch.nn as nn
from meta_device import on_meta
from mmengine.config import Config
from mmyolo.utils import register_all_modules

from mmgcp.errors import UserError
from mmgcp.pruning import count_channels
from mmgcp.utils.config import build_detector, load_config

ROOT = Path(__file__).parents[1]
PATHS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.py'))
RECIPES = [path for path in PATHS if '/_base_/' not in path]
AFTER_PRUNING = [path for path in RECIPES if path.endswith(('_finetune.py', '_distill.py'))]
TRAINED = {'yolov4_fast_1xb8-60e_voc-320', 'yolov4_n_fast_1xb8-60e_voc-320',
           'yolov4_n_fast_1xb8-48e_demo-160',
           'yolov5_n-v61_fast_1xb16-60e_voc-320',
           'yolov5_n-v61-p2-spatial_fast_1xb16-60e_voc-320', 'ssd300_r18-half_1xb8-80e_voc'}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the configs alone, which is the working directory."""
    register_all_modules(init_default_scope=False)
    shutil.copytree(str(ROOT / 'configs'), str(tmp_path / 'configs'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def student_config(path):
    """The config without the teacher of a distilling one, which has to be trained first."""
    cfg = load_config(path)
    cfg.model = cfg.model.get('student', cfg.model)
    return cfg


def head(path):
    return (ROOT / path).read_text().split('_base_ =')[0]


@pytest.mark.parametrize('path', PATHS)
def test_loads(path, clone):
    cfg = Config.fromfile(path)
    assert len(cfg) > 0
    if path in RECIPES:
        assert 'mmgcp' in cfg.custom_imports.imports and 'model' in cfg


@pytest.mark.parametrize('path', AFTER_PRUNING)
def test_before_pruning(path, clone):
    """Building the model says what is missing, and which command makes it."""
    cfg = student_config(path)
    folder = re.escape(str(Path(cfg.model.channels).parent))
    with pytest.raises(UserError, match=rf'there is no {folder}/pruned\.py.* `python tools/prune'
                                        rf'\.py CONFIG CHECKPOINT --work-dir {folder}` writes it'):
        build_detector(cfg)


@pytest.mark.parametrize('path', AFTER_PRUNING)
def test_after_pruning(path, clone):
    """The model has the channels of the table, and is that of the baseline otherwise."""
    cfg = student_config(path)
    plain = cfg.copy()
    plain.model = {key: value for key, value in cfg.model.items() if key != 'channels'}
    plain.model.type = plain.model.pop('detector')
    with on_meta():
        original = build_detector(plain)
    layer = next(name for name, module in original.named_modules()
                 if isinstance(module, nn.Conv2d) and module.groups == 1)
    inputs, outputs = count_channels(original)[layer]
    table = {layer: [inputs, outputs // 2]}
    file = clone / cfg.model.channels
    file.parent.mkdir(parents=True)
    file.write_text(f'model = dict(type="mmgcp.PrunedDetector", channels={json.dumps(table)})')
    with on_meta():
        pruned = build_detector(cfg)
    assert type(pruned) is type(original)
    assert count_channels(pruned) == {**count_channels(original), **table}
    assert cfg.load_from == str(Path(cfg.model.channels).with_suffix('.pth'))


@pytest.mark.parametrize('path', [path for path in RECIPES if path.endswith('_distill.py')])
def test_teacher(path, clone):
    cfg = load_config(path)
    assert load_config(cfg.model.teacher.config).model.type == cfg.model.student.detector


@pytest.mark.parametrize('path', RECIPES)
def test_head(path):
    """Its commands are about configs that exist, and it says whether it has been trained."""
    for named in re.findall(r'configs/\S+\.py', head(path)):
        assert (ROOT / named).is_file()
    assert head(path).startswith('# Not trained yet') != (Path(path).stem in TRAINED)
    stage = re.search(r'_(sparse|finetune|distill|prune)$', Path(path).stem)
    if stage and stage.group(1) in ('finetune', 'prune'):
        assert 'python tools/prune.py' in head(path)
    elif stage and stage.group(1) == 'sparse':
        assert f'python tools/train.py {path}' in head(path)


@pytest.mark.parametrize('path', RECIPES)
def test_name(path):
    """Algorithm, components, GPUs x batch size, length, data, stage."""
    assert re.fullmatch(
        r'[a-z]+\d*[a-z]*(_[a-z0-9-]+)*_\dx(b\d+|16b)-\d+(e|k)_(coco|voc|voc0712|voc-320|demo-160)'
        r'(_sparse|_prune|_finetune|_distill)?', Path(path).stem)
