# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of pruning: do they build, and are they set up as in the papers?"""
import fnmatch
import shlex

import pytest
import torch.nn as nn
from meta_device import on_meta
from mmengine.config import Config
from scripts import ROOT, load_script

from mmgcp.attention import attention_aside
from mmgcp.pipeline.finetuning import IntermediateFinetuning
from mmgcp.pruning import LayerGroup
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.options import options_of_config
from mmgcp.pruning.scores import criterion_names
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import build_detector, load_config

CONFIGS = ROOT / 'configs'
YOLOV4, YOLOV5 = ('yolov4/yolov4_fast_1xb64-50e_voc.py',
                  'yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_prune.py')
CPSCA = 'yolov4/yolov4_cpsca_fast_1xb64-50e_voc_prune.py'
THINET, LCP_VGG, LCP_RESNET = (f'ssd/ssd300_{name}.py' for name in (
    'vgg16_thinet_1xb8-24e_voc0712_prune', 'vgg16_lcp_1xb8-24e_voc0712_prune',
    'r50_1xb32-120k_voc0712'))
TYPES = {YOLOV4: None, YOLOV5: 'OBS', CPSCA: 'CPSCA', THINET: 'ThiNet', LCP_VGG: 'LCP',
         LCP_RESNET: 'LCP'}


def load(path):
    return load_config(str(CONFIGS / path))


@pytest.fixture(params=TYPES)
def path(request):
    return request.param


def test_prune_cfg(path):
    """Its settings are known, the criterion can be built, and each pattern means layers."""
    cfg = load(path)
    options = options_of_config(cfg.prune_cfg.to_dict(), path)  # raises if there are others
    criterion = options.get('criterion')  # without one the tools choose it
    assert (criterion and type(TASK_UTILS.build(criterion)).__name__) == TYPES[path]
    if path == CPSCA:  # does not trace on the meta device
        cfg = load(YOLOV4)
    with on_meta():
        detector = build_detector(cfg)
    names = [name for name, _ in detector.named_modules()]
    groups = options.get('groups', [])
    assert all(fnmatch.filter(names, pattern) for group in groups for pattern in group['modules'])
    if groups:
        layers = [name for name, module in detector.named_modules()
                  if isinstance(module, nn.Conv2d)]
        assert len(assign_groups(detector, layers, [LayerGroup(**group) for group in groups])) >= 10


def test_command(path, monkeypatch):
    """The head of the config has a command that tools/prune.py understands."""
    head = (CONFIGS / path).read_text().split('_base_ =')[0]
    if path == YOLOV4:
        assert 'tools/prune.py' not in head  # has stages as configs, which have the command
        return
    text = ''.join(line.lstrip('# ') for line in head.splitlines(True)).replace('\\\n', ' ')
    command = next(line for line in text.splitlines() if line.startswith('python tools/prune.py'))
    monkeypatch.setattr('sys.argv', shlex.split(command)[1:])
    args = load_script('prune.py').parse_args()
    assert args.config == f'configs/{path}'
    assert args.checkpoint or load(path).load_from
    needs = TASK_UTILS.build(load(path).prune_cfg.criterion.to_dict()).needs
    assert args.calib_batches >= 16 if needs else args.calib_batches == 16


@pytest.mark.parametrize('path, params, flops', [(YOLOV4, 0.353, 0.651), (CPSCA, 0.353, 0.651),
                                                 (YOLOV5, None, 0.5)])
def test_budget_and_training_data(path, params, flops):
    cfg = load(path)
    budgets = [cfg.prune_cfg.get(f'target_{name}') for name in ('params', 'flops')]
    assert budgets == [params, flops]
    assert ('groups' in cfg.prune_cfg) == ('yolov4' in path)
    # MMEngine cannot call a function whose config has a scope
    assert cfg.train_dataloader.collate_fn == dict(type='yolov5_collate')


@pytest.mark.parametrize('name', criterion_names())
def test_any_criterion_has_defaults(name):
    """--criterion NAME needs no config."""
    assert type(TASK_UTILS.build(dict(type=f'mmgcp.{name}'))).__name__ == name


MMYOLO_CPSCA = '''
_base_ = '{base}'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)
model = dict(type='mmgcp.SCADetector', detector_type=_base_.model.type)
'''


@pytest.mark.parametrize('base', [
    str(CONFIGS / YOLOV4), 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'])
def test_attention(base, tmp_path):
    """The detector is the base's with attention, which can be taken out."""
    if base.startswith('mmyolo::'):
        (tmp_path / 'cpsca.py').write_text(MMYOLO_CPSCA.format(base=base))
        cfg = load_config(str(tmp_path / 'cpsca.py'))
    else:
        cfg = load(CPSCA)
        assert cfg.prune_cfg.criterion == dict(type='mmgcp.CPSCA', fold_scales=True)
        assert cfg.max_epochs == cfg.train_cfg.max_epochs
        assert cfg.max_epochs == cfg.default_hooks.param_scheduler.max_epochs
        assert f'tools/train.py configs/{CPSCA}' in (CONFIGS / CPSCA).read_text()
    parts = ('backbone', 'neck', 'bbox_head.head_module')
    narrow = {f'model.{part}.widen_factor': 0.125 for part in parts}
    narrow.update({f'model.{part}.deepen_factor': 0.33 for part in ('backbone', 'neck')})
    base = load_config(base, narrow)
    cfg.merge_from_dict(narrow)
    model, plain = build_detector(cfg), build_detector(base)
    assert type(model) is type(plain) and len(model.sca) > 40
    with attention_aside(model, put_back=True):
        assert list(model.state_dict()) == list(plain.state_dict())


def test_thinet_of_ssd():
    """Half of conv1_1 to conv4_3; the data are those of mmdet's config for VOC."""
    cfg, usual = load(THINET), load_config('mmdet::pascal_voc/ssd300_voc0712.py')
    backbone = build_detector(Config(dict(default_scope='mmdet', model=dict(
        cfg.model.to_dict(), backbone=dict(cfg.model.backbone.to_dict(), init_cfg=None))))).backbone
    (group, ) = cfg.prune_cfg.groups
    pruned = [backbone.features[int(name.split('.')[-1])].out_channels for name in group.modules]
    assert group.ratio == 0.5
    assert pruned == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    assert cfg.model.bbox_head == usual.model.bbox_head
    assert cfg.val_dataloader.dataset.ann_file == usual.val_dataloader.dataset.ann_file
    assert dict(usual.val_evaluator.to_dict(), _scope_='mmdet') == cfg.val_evaluator.to_dict()
    ours, theirs = (config.train_dataloader.dataset for config in (cfg, usual))
    assert ours.times == 1 and ours.type == theirs.type == 'RepeatDataset'
    for first, second in zip(ours.dataset.datasets, theirs.dataset.datasets):
        for key in ('type', 'ann_file', 'data_prefix', 'filter_cfg', 'data_root'):
            assert first[key] == second[key]
        assert [step.type for step in first.pipeline] == [step.type for step in second.pipeline]


@pytest.mark.parametrize('path, settings, factor', [
    (THINET, None, 1), (YOLOV4, dict(epochs=1, lr=None, every=5), 0.1)])
def test_training_between_layers(path, settings, factor):
    cfg = load(path)
    training = IntermediateFinetuning(cfg, **(settings or cfg.prune_cfg.finetune))
    assert training.settings['lr'] == pytest.approx(cfg.base_lr * factor)


@pytest.mark.parametrize('path, ratio', [(LCP_VGG, 0.75), (LCP_RESNET, 0.7)])
def test_lcp_of_ssd(path, ratio):
    assert [group['ratio'] for group in load(path).prune_cfg.groups] == [ratio]


@pytest.mark.parametrize('name, base, iterations, lr', [
    ('vgg16_lcp_1xb32-60k', LCP_VGG, 60000, 5e-4),
    ('r50_lcp_1xb32-120k', LCP_RESNET, 120000, 1e-3)])
def test_finetuning_after_lcp(name, base, iterations, lr):
    cfg, base = load(f'ssd/ssd300_{name}_voc0712_finetune.py'), load(base)
    assert cfg.train_cfg == dict(
        type='IterBasedTrainLoop', max_iters=iterations, val_interval=10000)
    assert cfg.optim_wrapper.optimizer.lr == lr
    assert [step.type for step in cfg.param_scheduler] == ['MultiStepLR']
    assert cfg.param_scheduler[0].end == iterations and not cfg.param_scheduler[0].by_epoch
    assert cfg.train_dataloader.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert cfg.train_dataloader.batch_size == 32
    model = cfg.model.to_dict()
    assert model.pop('type') == 'mmgcp.PrunedDetector' and model.pop('channels')
    model['type'] = model.pop('detector')
    assert model == base.model


def test_finetuning_after_thinet():
    cfg = load('ssd/ssd300_vgg16_thinet_1xb8-12e_voc0712_finetune.py')
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[0].end == 12
    lr = cfg.optim_wrapper.optimizer.lr
    assert lr == 1e-3 and lr * 0.1**len(cfg.param_scheduler[0].milestones) == pytest.approx(1e-5)
    assert cfg.train_dataloader.dataset.times == 1
