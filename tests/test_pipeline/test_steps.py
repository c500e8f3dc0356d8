# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The order of the steps and what they are given, without running them."""
import functools
import http.server
import importlib
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmgcp.datasets.demo import DemoOptions, make_demo_dataset
from mmgcp.errors import UserError
from mmgcp.pipeline import CompressOptions, compress
from mmgcp.pipeline.tool_runner import ToolRunner
from mmgcp.utils.config import build_detector, load_config
from mmgcp.utils.options import options_table

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py')
ALL = ['train.py baseline', 'test baseline', 'train.py sparse', 'test sparse', 'prune.py prune',
       'test pruned', 'train.py distilled', 'test distilled']


class Interrupted(Exception):
    """The user pressed the keys."""


class FakeTools(ToolRunner):
    """Notes what would be run, and leaves what that would leave."""

    done: list = []
    arguments: dict = {}
    stop_in = None

    def run(self, stage, tool, *arguments):
        self._note(f'{tool} {stage}', arguments)
        if tool == 'train.py':
            epochs = Config.fromfile(arguments[0]).train_cfg.max_epochs
            (self.folder / stage).mkdir(exist_ok=True)
            (self.folder / stage / f'epoch_{epochs}.pth').write_text('weights')
        else:
            (self.folder / 'pruned').mkdir(exist_ok=True)
            groups = Config.fromfile(arguments[0]).get('attention_groups')
            (self.folder / 'pruned' / 'pruned.py').write_text(
                f"_base_ = '../baseline.py'\nattention_groups = {groups!r}\n")
            (self.folder / 'pruned' / 'pruned.pth').write_text('weights')

    def test(self, stage, config, checkpoint):
        self._note(f'test {stage}', (str(config), checkpoint))
        return {'pascal_voc/mAP': 0.25, 'pascal_voc/AP50': 0.5}

    def _note(self, step, arguments):
        self.done.append(step)
        self.arguments[step] = arguments
        if step == self.stop_in:
            raise Interrupted


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts the pipeline and returns the steps it made."""
    module = importlib.import_module('mmgcp.pipeline.compress')
    monkeypatch.setattr(module, 'ToolRunner', FakeTools)
    monkeypatch.setattr(module, 'rehearse_stages', lambda *args: None)  # there are no data
    monkeypatch.setattr(module, 'draw_detections', lambda stages, path: None)
    monkeypatch.setattr(module, 'measure_stages', lambda configs, checkpoints: [
        dict(parameters=10, macs=20, latency_ms=1.5)] * len(configs))

    def run(stop_in=None, steps=ALL, **options):
        monkeypatch.setattr(FakeTools, 'done', [])
        monkeypatch.setattr(FakeTools, 'arguments', {})
        monkeypatch.setattr(FakeTools, 'stop_in', stop_in)
        options = dict(dict(config=CONFIG, target_params=0.5, epochs=3), **options)
        try:
            rows = compress(CompressOptions(
                work_dir=tmp_path / 'run', tools_dir=ROOT / 'tools', **options))
            assert [f"test {row['stage']}" for row in rows] == [
                step for step in steps if step.startswith('test')]
        except Interrupted:
            assert stop_in
        return FakeTools.done

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'run'


def test_each_stage_is_tested_right_after_it(start):
    assert start() == ALL
    assert start() == []


@pytest.mark.parametrize('step', [ALL[0], ALL[3], ALL[4], ALL[6]])
def test_interrupted(start, step):
    """It goes on with that step, and does none of those before again."""
    start(stop_in=step)
    assert start() == ALL[ALL.index(step):]


@pytest.mark.parametrize('options, step', [
    (dict(lr=0.5), 'train.py baseline'), (dict(sparse_lr=0.5), 'train.py sparse'),
    (dict(sparsity_penalty='proximal'), 'train.py sparse'),
    (dict(prune_options='--round-to 8'), 'prune.py prune'),
    (dict(distill_lr=0.5), 'train.py distilled')])
def test_changed_option(start, options, step):
    start()
    assert start(**options) == ALL[ALL.index(step):]


@pytest.mark.parametrize('name, step', [
    ('prune_cfg.merge', 'prune.py prune'), ('sparse_epochs', 'train.py sparse'),
    ('distill_epochs', 'train.py distilled'), ('attention_groups', 'train.py distilled'),
    ('randomness.seed', 'train.py baseline')])
def test_changed_config(start, tmp_path, name, step):
    """It is done again from the first stage that the changed setting matters to."""
    base = tmp_path / 'config.py'
    for value in (1, 2):
        base.write_text(f'_base_ = {CONFIG!r}\n')
        cfg = Config.fromfile(str(base))
        cfg.merge_from_dict({'sparsity_rate': 0.5, name: value})
        cfg.dump(base)
        steps = start(config=str(base))
    assert steps == ALL[ALL.index(step):]
    groups = Config.fromfile(str(tmp_path / 'run' / 'distilled.py')).model.groups
    assert groups == (2 if name == 'attention_groups' else load_config(CONFIG).attention_groups)


@pytest.mark.parametrize('name, step', [
    ('sparse/epoch_3.pth', 'train.py sparse'), ('pruned/pruned.py', 'prune.py prune'),
    ('pruned/pruned.pth', 'prune.py prune')])
def test_deleted_result(start, folder, name, step):
    start(sparse_epochs=3)
    (folder / name).unlink()
    assert start(sparse_epochs=3) == ALL[ALL.index(step):]


def test_pruned_by_hand(start, folder):
    """That network is tested and distilled then."""
    start()
    with (folder / 'pruned' / 'pruned.py').open('a') as file:
        file.write('pruned_by_hand = True\n')
    assert start() == ALL[5:]


def test_training_does_not_validate(start, folder):
    """The config does, for use by hand."""
    start(sparse_epochs=4, distill_epochs=3)
    for stage, epochs in (('baseline', 3), ('sparse', 4), ('distilled', 3)):
        arguments = FakeTools.arguments[f'train.py {stage}']
        assert arguments[-2:] == ('--cfg-options', f'train_cfg.val_begin={epochs + 1}')
        assert 'val_begin' not in Config.fromfile(str(folder / f'{stage}.py')).train_cfg


@pytest.mark.parametrize('val_begin, validations', [(5, 0), (4, 1), (1, 3)])
def test_training_loop_without_validation(val_begin, validations):
    """MMEngine's loop, which validates at its end else, and in the last epochs here."""
    runner = MagicMock()
    loop = EpochBasedTrainLoop(runner, DataLoader([0, 1]), max_epochs=4, val_begin=val_begin,
                               val_interval=2, dynamic_intervals=[(3, 1)])
    loop.run()
    assert loop.epoch == 4 and runner.val_loop.run.call_count == validations


def test_epochs(start, folder):
    """What is not said comes from the config, or from the first stage."""
    start(epochs=400, cfg_options=dict(distill_epochs=9))
    stages = {stage: Config.fromfile(str(folder / f'{stage}.py')).max_epochs
              for stage in ('baseline', 'sparse', 'distilled')}
    base = load_config(CONFIG)
    assert stages == dict(baseline=400, sparse=base.get('sparse_epochs', 67), distilled=9)
    start(epochs=400, distill_epochs=5, cfg_options=dict(sparse_epochs=None))
    assert Config.fromfile(str(folder / 'sparse.py')).max_epochs == 67
    assert Config.fromfile(str(folder / 'distilled.py')).max_epochs == 5


@pytest.mark.parametrize('options', [
    dict(sparse_epochs=0), dict(cfg_options=dict(sparse_epochs=0))])
def test_without_sparse_training(start, folder, options):
    """The baseline is pruned, by the default criterion; also where it was sparse at first."""
    steps = [step for step in ALL if 'sparse' not in step]
    assert start(steps=steps, **options) == steps
    config, checkpoint, *arguments = FakeTools.arguments['prune.py prune']
    assert (config, checkpoint) == (
        str(folder / 'baseline.py'), str(folder / 'baseline' / 'epoch_3.pth'))
    assert '--criterion' not in arguments and not (folder / 'sparse.py').exists()
    assert start(sparse_epochs=2) == ALL[2:]
    assert start(steps=steps, **options) == ALL[4:]


def test_learning_rates(start, folder):
    def rates():
        return [Config.fromfile(str(folder / f'{stage}.py')).optim_wrapper.optimizer.lr
                for stage in ('baseline', 'sparse', 'distilled')]

    start(lr=0.5)
    assert rates() == [0.5, 0.5, pytest.approx(0.05)]
    start(lr=0.5, sparse_lr=0.125, distill_lr=0.25)
    assert rates() == [0.5, 0.125, 0.25]


def test_prune_options(start):
    start(prune_options="--round-to 8 --sensitivity --metric 'a b'")
    arguments = FakeTools.arguments['prune.py prune']
    assert arguments[2:7] == ('--round-to', '8', '--sensitivity', '--metric', 'a b')
    assert arguments[7:9] == ('--target-params', '0.5')
    start(target_params=None, prune_options='--ratio 0.5')
    assert FakeTools.arguments['prune.py prune'][2:4] == ('--ratio', '0.5')


V8 = 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py'


@pytest.mark.parametrize('options, criterion', [
    (dict(), 'BestOf'), (dict(prune_options='--criterion LCP'), 'LCP'),
    (dict(prune_options='--calib-batches 0'), None), (dict(prune_options='--plan a.json'), None),
    (dict(target_params=None, prune_options='--ratio 0.5'), None),
    (dict(target_params=None, prune_options='--target-latency 5'), 'BestOf'),
    (dict(cfg_options=dict(prune_cfg=None)), 'BestOf'),
    (dict(target_params=None, cfg_options=dict(prune_cfg=dict(target_flops=0.5))), 'BestOf'),
    (dict(cfg_options={'prune_cfg': dict(criterion=dict(type='mmgcp.Taylor'))}), None)])
def test_criterion(start, options, criterion):
    """The loss tells whether scale factors are the better ones, unless the user says what is."""
    start(config=V8, **options)
    arguments = FakeTools.arguments['prune.py prune']
    found = [after for name, after in zip(arguments, arguments[1:]) if name == '--criterion']
    assert found == ([criterion] if criterion else [])


@pytest.mark.parametrize('options, message', [
    (dict(prune_options='--rounded 8'), 'prune.py does not take .*--rounded 8.*unrecognized'),
    (dict(prune_options='--round-to x'), 'prune.py does not take .*invalid int'),
    (dict(prune_options='--dry-run'), 'must not have --dry-run'),
    (dict(prune_options='--launcher pytorch'), 'must not have --dry-run, --work-dir or --launcher'),
    (dict(prune_options='--device nowhere'), "'nowhere' is not the name of a device"),
    (dict(config=V8, target_params=None),
     'has no prune_cfg: say how much to prune'),
    (dict(checkpoint='none.pth'), 'there is no checkpoint none.pth'),
    (dict(cfg_options={'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop',
                                         max_iters=9)}, epochs=None), 'no number of epochs'),
    (dict(sparse_epochs=-1), 'sparse_epochs must be an integer .* but is -1'),
    (dict(distill_epochs=0), 'distill_epochs must be an integer .* but is 0'),
    (dict(lr=-1.), 'lr must be a finite number above 0, but is -1.0'),
])
def test_wrong_options(start, folder, options, message):
    """They are noticed before anything is done."""
    with pytest.raises(UserError, match=message):
        start(**options)
    assert FakeTools.done == [] and not (folder / 'state.json').exists()


@pytest.fixture
def save_detector(tmp_path):
    """A function that saves untrained weights."""

    def save(num_classes):
        cfg = load_config(CONFIG, {'model.bbox_head.head_module.num_classes': num_classes})
        path = tmp_path / f'{num_classes}.pth'
        torch.save(dict(meta={}, state_dict=build_detector(cfg).state_dict()), str(path))
        return path

    return save


def test_checkpoint_of_other_classes(start, save_detector, demo_root):
    path = save_detector(7)
    with pytest.raises(UserError, match='does not fit') as caught:
        start(checkpoint=str(path), data=str(demo_root))
    assert f'--cfg-options load_from={path}' in str(caught.value)
    assert start(checkpoint=str(save_detector(4)), data=str(demo_root)) == ALL[1:]


def test_checkpoint_is_a_url(start, save_detector, folder, monkeypatch, tmp_path):
    classes = load_config(CONFIG).model.bbox_head.head_module.num_classes
    path = save_detector(classes)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'downloads'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/{path.name}'
        assert start(checkpoint=url) == ALL[1:]
        server.shutdown()
    assert FakeTools.arguments['test baseline'][1] == url
    assert Config.fromfile(str(folder / 'sparse.py')).load_from == url
    distilled = Config.fromfile(str(folder / 'distilled.py'))
    assert distilled.model.teacher.checkpoint == url


def test_several_training_splits(start, folder, tmp_path):
    root = tmp_path / 'shapes'
    make_demo_dataset(root, DemoOptions(num_train=3, num_val=2, num_test=2, size=128, seed=3))
    lists = root / 'ImageSets' / 'Main'
    (lists / 'trainval.txt').unlink()
    start(data=str(root))
    dataset = Config.fromfile(str(folder / 'baseline.py')).train_dataloader.dataset
    names = [(lists / f'{split}.txt').read_text().split() for split in ('train', 'val')]
    assert Path(dataset.ann_file).read_text().split() == names[0] + names[1]
    assert len(names[0] + names[1]) == 5


def test_docs_list_all_options():
    assert options_table(CompressOptions) in (ROOT / 'docs' / 'training.md').read_text()
