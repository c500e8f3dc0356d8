# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The example configs of the stages, each run for two iterations on noise, made narrow."""
import math
import shlex
import shutil
from pathlib import Path

import mmyolo
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from scripts import run_here
from tiers import slow_except
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from mmgcp.registry import DATASETS
from mmgcp.utils.config import build_detector, load_config

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((path.parent.name, path.stem[:-len('_sparse')])
                  for path in (ROOT / 'configs').rglob('*_sparse.py'))
FAMILIES = ('yolov4', 'yolov5', 'yolov6', 'yolov7', 'yolov8', 'yolox', 'rtmdet', 'ppyoloe')
SIZE = 128
ITERS = 2
OF_MMYOLO = [example for example in EXAMPLES if example[0] != 'yolov4']


@DATASETS.register_module(force=True)
class NoiseWithBoxes(Dataset):
    """As many images of noise as two iterations need."""

    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 2 * ITERS

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        boxes = torch.tensor([[.1, .1, .6, .7], [.3, .4, .9, .9]]) * SIZE
        sample = DetDataSample(gt_instances=InstanceData(
            bboxes=HorizontalBoxes(boxes), labels=torch.tensor([index % 3, 0])))
        return dict(inputs=image, data_samples=sample)


class QuietRunner(Runner):
    """Without asking compilers and the like for their versions, which takes seconds."""

    def _log_env(self, env_cfg):
        pass


def noise(number):
    dataset = NoiseWithBoxes()
    return torch.stack([dataset[index]['inputs'] for index in range(number)]).float() / 255


def narrow_options(cfg):
    """Settings for a small network on small images."""
    options = {f'model.{part}.widen_factor': 0.125
               for part in ('backbone', 'neck', 'bbox_head.head_module')}
    if 'deepen_factor' in cfg.model.backbone:
        options.update({f'model.{part}.deepen_factor': 0.33 for part in ('backbone', 'neck')})
    options['model.backbone.init_cfg'] = None  # downloads nothing
    if 'batch_augments' in cfg.model.data_preprocessor:
        options['model.data_preprocessor.batch_augments.0.random_size_range'] = (SIZE, SIZE)
    return options


def narrow(cfg):
    cfg.merge_from_dict(narrow_options(cfg))
    return cfg


def train(cfg, folder, keep_sparsity=True):
    """Train with everything of a config but its data and warm-up."""
    cfg = cfg.copy()
    cfg.merge_from_dict(dict(
        train_dataloader=dict(batch_size=2, num_workers=0, persistent_workers=False,
                              pin_memory=False),
        train_cfg=dict(max_epochs=1),
        work_dir=str(folder), experiment_name=folder.name, randomness=dict(seed=0)))
    cfg.train_dataloader.dataset = dict(type='mmgcp.NoiseWithBoxes')
    for part in ('val', 'test'):
        for name in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{part}_{name}'] = None
    cfg.default_hooks.checkpoint = None
    # With a warm-up the learning rate would be next to nothing
    if cfg.get('param_scheduler'):
        cfg.param_scheduler = None
    else:
        kind = cfg.default_hooks.param_scheduler.type.split('.')[-1]
        minimum = dict(YOLOv5ParamSchedulerHook=dict(warmup_mim_iter=0),
                       PPYOLOEParamSchedulerHook=dict(warmup_min_iter=1))[kind]  # divides by it
        cfg.default_hooks.param_scheduler.update(warmup_epochs=0, **minimum)
    for hook in cfg.custom_hooks:
        if is_sparsity(hook):
            hook.histogram_interval = 0  # to save time
    if not keep_sparsity:
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if not is_sparsity(hook)]
    runner = QuietRunner.from_cfg(cfg)
    runner.train()
    assert runner.iter == ITERS
    return runner


def is_sparsity(hook):
    return hook.type == 'mmgcp.DynamicSparsityHook'


def scale_factors(model):
    return torch.cat([module.weight.detach().abs() for module in model.modules()
                      if isinstance(module, _BatchNorm)])


def count(model):
    return sum(param.numel() for param in model.parameters())


def save(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(meta={}, state_dict=model.state_dict()), str(path))


def calibrate(model):
    """Let the statistics of the normalisation fit, or signals fade away in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average
    with torch.no_grad():
        model.train()(noise(2 * ITERS), mode='tensor')
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def pruning_command(text):
    """The arguments of tools/prune.py in the head of a config."""
    head = ''.join(line.lstrip('# ') for line in text.split('_base_')[0].splitlines(True))
    return shlex.split(head.replace('\\\n', ' ').split('python tools/prune.py')[1])


class Stages:
    """The stages of an example, in a folder with its configs, each done when asked for."""

    def __init__(self, folder, family, name):
        self.folder, self.family, self.name = folder, family, name
        shutil.copytree(str(ROOT / 'configs'), str(folder / 'configs'))
        self.results = {}

    def path(self, stage):
        return self.folder / 'configs' / self.family / f'{self.name}_{stage}.py'

    def load(self, stage):
        return load_config(str(self.path(stage)))

    def once(self, stage):
        if stage not in self.results:
            self.results[stage] = getattr(self, stage)()
        return self.results[stage]

    def baseline(self):
        """Config and checkpoint of a network that passes for a trained one."""
        cfg = narrow(self.load('sparse'))
        torch.manual_seed(0)
        model = build_detector(cfg)
        model.init_weights()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                torch.nn.init.uniform_(module.weight, 0.2, 1.5)  # what channels are pruned by
        calibrate(model)
        save(model, self.folder / 'baseline.pth')
        return cfg, self.folder / 'baseline.pth'

    def sparse(self):
        """The runner, and the one of the same training without the penalty."""
        cfg, checkpoint = self.once('baseline')
        cfg = cfg.copy()
        cfg.load_from = str(checkpoint)
        return (train(cfg, self.folder / 'with-penalty'),
                train(cfg, self.folder / 'without', keep_sparsity=False))

    def pruned(self):
        """The command in the head of the fine-tuning's config; returns its folder."""
        cfg, _ = self.once('baseline')
        arguments = pruning_command(self.path('finetune').read_text())
        checkpoint = self.folder / arguments[1]
        save(self.once('sparse')[0].model, checkpoint)
        options = [f'{key}={value}'.replace(' ', '') for key, value in narrow_options(cfg).items()]
        with pytest.MonkeyPatch.context() as patch:
            # its pictures take long
            patch.setattr('mmgcp.pruning.report.write_report', lambda *args: None)
            # As if the scale factors were the best: there are no images to find out with
            assert arguments[-2:] == ['--criterion', 'BestOf']
            arguments[-1] = 'BNScale'
            result = run_here('prune.py', *arguments, '--input-size', SIZE, SIZE, '--cfg-options',
                              *options)
        assert result.returncode == 0, result.stderr
        return Path(self.load('finetune').load_from).parent

    def finetune(self):
        self.once('pruned')
        return train(narrow(self.load('finetune')), self.folder / 'finetune')

    def distill(self):
        self.once('pruned')
        teacher, checkpoint = self.once('baseline')
        cfg = self.load('distill')
        cfg.model.student = narrow(self.load('finetune')).model
        cfg.model.teacher = dict(config=teacher.model.to_dict(), checkpoint=str(checkpoint))
        return train(cfg, self.folder / 'distill')


@pytest.fixture(
    scope='module', ids=lambda example: example[1],
    params=slow_except([example for example in EXAMPLES if example[0] == 'yolov5'], EXAMPLES))
def stages(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Stages(folder, *request.param)


def check_schedule(cfg):
    """All that depends on the number of epochs fits it."""
    epochs = cfg.max_epochs
    assert 10 <= epochs == cfg.train_cfg.max_epochs and epochs % cfg.train_cfg.val_interval == 0
    hook = cfg.default_hooks.param_scheduler
    if cfg.get('param_scheduler'):
        assert cfg.param_scheduler[-1].end == epochs
        for scheduler, following in zip(cfg.param_scheduler[1:], cfg.param_scheduler[2:]):
            assert scheduler.begin < scheduler.end == following.begin
    elif 'total_epochs' in hook:
        assert math.isclose(hook.total_epochs, 1.2 * epochs)
    else:
        assert hook.max_epochs == epochs
    switches = [hook.switch_epoch for hook in cfg.custom_hooks if 'switch_epoch' in hook]
    switches += [epochs - hook.num_last_epochs for hook in cfg.custom_hooks
                 if 'num_last_epochs' in hook]
    intervals = [epoch for epoch, _ in cfg.train_cfg.get('dynamic_intervals', [])]
    assert all(0 < epoch < epochs for epoch in switches)
    if switches:
        assert switches == intervals
    assert cfg.model.get('train_cfg', {}).get('initial_epoch', 0) == 0


def test_every_family_has_each_stage():
    assert len(EXAMPLES) == 9 and {family for family, _ in EXAMPLES} == set(FAMILIES)
    for family, name in EXAMPLES:
        for stage in ('sparse', 'finetune', 'distill'):
            lines = (ROOT / 'configs' / family / f'{name}_{stage}.py').read_text().splitlines()
            assert len(lines) <= 50  # a screen


@pytest.mark.parametrize('family, name', OF_MMYOLO)
def test_checkpoint_is_the_published_one(family, name):
    metafile = Path(mmyolo.__file__).parent / '.mim' / 'configs' / family / 'metafile.yml'
    if not metafile.is_file():
        pytest.skip('MMYOLO comes without its metafiles')
    cfg = load_config(str(ROOT / 'configs' / family / f'{name}_sparse.py'))
    assert f'Weights: {cfg.load_from}\n' in metafile.read_text()


def test_sparse_config(stages):
    cfg = stages.load('sparse')
    check_schedule(cfg)
    hooks = [hook for hook in cfg.custom_hooks if is_sparsity(hook)]
    assert len(hooks) == 1 and hooks[0].rate == cfg.sparsity_rate > 0
    assert any(hook.type == 'EMAHook' for hook in cfg.custom_hooks)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        for hook in cfg.custom_hooks:
            HOOKS.build({key: value for key, value in hook.items() if key != 'priority'})
    base = load_config(pruning_command(stages.path('finetune').read_text())[0])
    collate_fn = dict(base.train_dataloader.collate_fn)
    collate_fn.pop('_scope_', None)
    assert cfg.train_dataloader.collate_fn == collate_fn
    assert cfg.model.backbone == base.model.backbone
    assert cfg.optim_wrapper.optimizer == base.optim_wrapper.optimizer


def test_sparse_training(stages):
    """The penalty shrinks the scale factors."""
    runner, other = stages.once('sparse')
    shrunk, free = scale_factors(runner.model), scale_factors(other.model)
    assert torch.isfinite(shrunk).all()
    assert shrunk.double().sum() < free.double().sum()
    assert (shrunk < free).float().mean() > 0.5
    assert runner.message_hub.get_scalar('train/sparsity_rate').current() > 0


def test_pruned(stages):
    """tools/prune.py, called as the head of the fine-tuning's config says."""
    folder = stages.once('pruned')
    cfg = load_config(str(folder / 'pruned.py'))
    student, full = build_detector(cfg), build_detector(stages.once('baseline')[0])
    assert 0.2 < count(student) / count(full) < 0.6
    assert not any(is_sparsity(hook) for hook in cfg.custom_hooks)


def test_finetune(stages):
    runner = stages.once('finetune')
    cfg = stages.load('finetune')
    check_schedule(cfg)
    assert count(runner.model) < 0.6 * count(build_detector(stages.once('baseline')[0]))
    assert not any(is_sparsity(hook) for hook in cfg.custom_hooks)
    assert all(torch.isfinite(param).all() for param in runner.model.parameters())


def test_distill_config(stages):
    stages.once('pruned')
    cfg, finetune = stages.load('distill'), stages.load('finetune')
    check_schedule(cfg)
    assert cfg.model.student == finetune.model and cfg.load_from == finetune.load_from
    sparse = stages.load('sparse')
    assert cfg.model.teacher.checkpoint == sparse.load_from  # both begin with the baseline
    base = pruning_command(stages.path('finetune').read_text())[0]
    assert cfg.model.teacher.config == base


def test_distill_training(stages):
    """Two iterations run, and the attention loss falls when one batch is fitted."""
    distiller = stages.once('distill').model
    assert count(distiller) < 0.6 * count(distiller.teacher)
    boxes = torch.tensor([[0, 1, .1, .1, .6, .7], [1, 0, .3, .4, .9, .9]])
    boxes[:, 2:] *= SIZE
    samples = dict(bboxes_labels=boxes, img_metas=[dict(batch_input_shape=(SIZE, SIZE))] * 2)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=2e-3)
    history = []
    for _ in range(8):
        losses = distiller(noise(2), samples, mode='loss')
        attention = [loss for name, loss in losses.items() if name.startswith('loss_attention')]
        assert len(attention) >= 2
        history.append(sum(attention).item())
        optimizer.zero_grad()
        sum(attention).backward()
        optimizer.step()
    assert history[-1] < 0.9 * history[0]
