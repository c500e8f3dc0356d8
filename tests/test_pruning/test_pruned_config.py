# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import shutil

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmyolo.models import YOLODetector
from pruning_samples import difference, run
from scripts import output_of, run_here

from mmgcp.pruning.detector import drop_hooks, make_pruned_config
from mmgcp.utils.config import build_detector


def read(folder):
    cfg = Config.fromfile(folder / 'pruned.py')
    model = MODELS.build(cfg.model)
    checkpoint = torch.load(cfg.load_from, weights_only=False)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    return model, checkpoint


@pytest.fixture
def small():
    """A config with what its kind can have."""
    return Config(dict(
        model=dict(
            type='RetinaNet',
            init_cfg=dict(type='Pretrained', checkpoint='a.pth'),
            backbone=dict(depth=18, init_cfg=dict(type='Pretrained', checkpoint='b.pth')),
            necks=[dict(init_cfg=dict(type='Pretrained', checkpoint='c.pth')),
                   dict(init_cfg=dict(type='Xavier'))]),
        custom_imports=dict(imports='other', allow_failed_imports=True),
        train_dataloader=dict(collate_fn=dict(type='x', _scope_='mmyolo')),
        val_dataloader=None, work_dir='here', load_from='there', resume=True))


def test_same_detector_with_the_same_outputs(pruned_folder, config_files):
    with DefaultScope.overwrite_default_scope('mmyolo'):
        model, checkpoint = read(pruned_folder)
    assert type(model) is YOLODetector
    original = build_detector(Config.fromfile(config_files[0]))
    assert list(model.state_dict()) == list(original.state_dict())
    again = build_detector(Config.fromfile(pruned_folder / 'pruned.py'))
    again.load_state_dict(checkpoint['state_dict'], strict=True)
    assert difference(run(model), run(again)) == 0.
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(
        0.4 * sum(x.numel() for x in original.parameters()), rel=0.01)


def test_config_without_bases(pruned_folder, config_files):
    text = (pruned_folder / 'pruned.py').read_text()
    assert '\n_base_ =' not in '\n' + text
    original, cfg = (Config.fromfile(path) for path in (config_files[0],
                                                        pruned_folder / 'pruned.py'))
    assert cfg.custom_imports.imports == ['mmgcp']
    expected, content = original.to_dict(), cfg.to_dict()
    model = content['model']
    assert model.pop('type') == 'mmgcp.PrunedDetector'
    assert model.pop('detector') == 'mmyolo.YOLODetector'
    assert len(model.pop('channels')) > 50
    assert model.pop('original_classes') == [3]
    expected['model'].pop('type')
    assert json.dumps(model, sort_keys=True) == json.dumps(expected['model'], sort_keys=True)
    for name in ('test_pipeline', 'optim_wrapper', 'prune_cfg', 'anchors', 'max_epochs'):
        assert json.dumps(content[name], sort_keys=True) == json.dumps(
            expected[name], sort_keys=True)


def test_child_config_overrides_the_same_places(pruned_folder, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = '{pruned_folder}/pruned.py'\n"
                     'model = dict(bbox_head=dict(loss_cls=dict(loss_weight=7.),\n'
                     '             match_iou_thr=0.5), test_cfg=dict(score_thr=0.42))\n')
    cfg = Config.fromfile(child)
    model = build_detector(cfg)
    assert model.bbox_head.loss_cls.loss_weight == 7.
    assert model.bbox_head.match_iou_thr == 0.5
    assert model.bbox_head.test_cfg.score_thr == 0.42
    assert model.bbox_head.test_cfg.max_per_img == 300
    state = torch.load(pruned_folder / 'pruned.pth', weights_only=False)['state_dict']
    model.load_state_dict(state, strict=True)


def test_child_of_the_original_names_the_table(pruned_folder, config_files, tmp_path):
    """It inherits the detector's config, and is as good as one that inherits pruned.py."""
    child = tmp_path / 'finetune.py'
    child.write_text(f"_base_ = '{config_files[0]}'\n"
                     f"load_from = '{pruned_folder}/pruned.pth'\n"
                     "model = dict(type='mmgcp.PrunedDetector', detector=_base_.model.type,\n"
                     f"             channels='{pruned_folder}/pruned.py')\n")
    cfg, pruned = Config.fromfile(child), Config.fromfile(pruned_folder / 'pruned.py')
    model, expected = build_detector(cfg), build_detector(pruned)
    state = torch.load(cfg.load_from, weights_only=False)['state_dict']
    for detector in (model, expected):
        detector.load_state_dict(state, strict=True)
    assert difference(run(model), run(expected)) == 0.
    again = make_pruned_config(cfg, 'mmyolo.YOLODetector', {'backbone.stem.bn': [1]}).model
    assert again.channels == {**pruned.model.channels, 'backbone.stem.bn': [1]}
    assert again.detector == 'mmyolo.YOLODetector'


def test_init_detector(pruned_folder):
    model = init_detector(str(pruned_folder / 'pruned.py'), str(pruned_folder / 'pruned.pth'),
                          device='cpu')
    assert type(model) is YOLODetector and not model.training
    assert list(model.dataset_meta['classes']) == ['Platelets', 'RBC', 'WBC']
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    result = inference_detector(model, image)
    assert result.pred_instances.bboxes.shape[1] == 4


def test_det_inferencer_with_the_scope_of_mmyolo(pruned_folder, tmp_path):
    inferencer = DetInferencer(str(pruned_folder / 'pruned.py'), str(pruned_folder / 'pruned.pth'),
                               device='cpu', scope='mmyolo')
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    (found, ) = inferencer(image, no_save_vis=True, out_dir=str(tmp_path))['predictions']
    assert {'labels', 'scores', 'bboxes'} <= set(found)


@pytest.mark.parametrize('meta', [{}, dict(dataset_meta={}), dict(CLASSES=('a', 'b', 'c'))])
def test_same_class_names_as_the_original(config_files, tmp_path, meta):
    """Also where the checkpoint has none, or has them as MMDetection 2 wrote them."""
    config, checkpoint = config_files
    state = torch.load(str(checkpoint), weights_only=False)['state_dict']
    torch.save(dict(state_dict=state, meta=meta), str(tmp_path / 'original.pth'))
    output_of('prune.py', config, tmp_path / 'original.pth', '--work-dir', tmp_path / 'pruned',
              '--calib-batches', 0, '--ratio', 0.3)
    original = init_detector(str(config), str(tmp_path / 'original.pth'), device='cpu')
    pruned = init_detector(str(tmp_path / 'pruned/pruned.py'), str(tmp_path / 'pruned/pruned.pth'),
                           device='cpu')
    if meta != dict(dataset_meta={}):  # with which MMDetection knows no names
        assert pruned.dataset_meta['classes'] == original.dataset_meta['classes']
    assert len(pruned.dataset_meta['classes']) == (3 if 'CLASSES' in meta else 80)


def test_copied_folder(pruned_folder, tmp_path):
    copy = tmp_path / 'elsewhere'
    copy.mkdir()
    for name in ('pruned.py', 'pruned.pth'):
        shutil.copy(pruned_folder / name, copy)
    assert Config.fromfile(copy / 'pruned.py').load_from == f'{copy}/pruned.pth'
    with DefaultScope.overwrite_default_scope('mmyolo'):
        read(copy)


def test_pruned_again(pruned_folder, tmp_path):
    out = tmp_path / 'again'
    # the checkpoint is the config's load_from
    result = run_here('prune.py', pruned_folder / 'pruned.py', '--work-dir', out,
                      '--target-params', 0.7)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((folder / 'report.json').read_text())
                     for folder in (pruned_folder, out))
    assert second['params']['before'] == first['params']['after']
    assert second['params']['after'] == pytest.approx(0.7 * first['params']['after'], rel=0.01)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        model, _ = read(out)
    assert sum(x.numel() for x in model.parameters()) == second['params']['after']
    cfg = Config.fromfile(out / 'pruned.py')
    assert cfg.model.detector == 'mmyolo.YOLODetector'


def test_make_pruned_config(small):
    before = small.to_dict()
    content = make_pruned_config(small, 'mmdet.RetinaNet', {'conv': [1, 2]}).to_dict()
    assert small.to_dict() == before
    assert content['model'] == dict(
        type='mmgcp.PrunedDetector', detector='mmdet.RetinaNet', channels={'conv': [1, 2]},
        backbone=dict(depth=18), necks=[{}, dict(init_cfg=dict(type='Xavier'))])
    assert content['custom_imports']['imports'] == ['other', 'mmgcp']
    assert content['train_dataloader'] == dict(collate_fn=dict(type='x'))
    assert 'work_dir' not in content and content['resume'] is False


class DynamicSparsityHook:
    """As a config that names classes instead of strings would."""


@pytest.mark.parametrize('kind', [
    'mmgcp.DynamicSparsityHook', 'DynamicSparsityHook', DynamicSparsityHook])
def test_hooks_for_sparse_training_are_dropped(kind):
    """They would press the channels that stay when the pruned detector is trained."""
    ema, press = dict(type='EMAHook', momentum=0.1), dict(type=kind, rate=1.)
    cfg = Config(dict(model=dict(type='RetinaNet'), custom_hooks=[press, ema, press]))
    assert drop_hooks(cfg) == ['DynamicSparsityHook'] * 2
    assert [dict(hook) for hook in cfg.custom_hooks] == [ema]
    assert drop_hooks(cfg) == []


@pytest.mark.parametrize('hooks', [{}, dict(custom_hooks=None), dict(custom_hooks=[]),
                                   dict(custom_hooks=[dict(type='mmgcp.DistillAdapterHook')])])
def test_nothing_to_drop(hooks):
    cfg = Config(dict(hooks, model=dict(type='RetinaNet')))
    before = cfg.to_dict()
    assert drop_hooks(cfg) == [] and cfg.to_dict() == before


def test_scope_in_the_type_is_dropped(small):
    small.model.type = 'mmyolo.YOLODetector'
    content = make_pruned_config(small, 'mmyolo.YOLODetector', {})
    assert content.model.detector == 'mmyolo.YOLODetector'


def test_tables_of_a_model_pruned_twice_are_merged(small):
    first = make_pruned_config(small, 'mmdet.RetinaNet', {'a': [1, 4], 'b': [4]})
    second = make_pruned_config(first, 'mmdet.RetinaNet', {'b': [3], 'c': [2]})
    assert second.model.to_dict()['channels'] == {'a': [1, 4], 'b': [3], 'c': [2]}
    assert second.model.detector == 'mmdet.RetinaNet'
    assert second.custom_imports.imports == ['other', 'mmgcp']
