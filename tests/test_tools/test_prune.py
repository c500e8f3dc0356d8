# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import itertools
import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from scripts import pruned_weights, run_here, run_process
from tiers import slow_except
from yolov4_samples import config_text

from mmgcp.analysis import count_complexity
from mmgcp.pruning import PruningPlan
from mmgcp.pruning.scores import criterion_names
from mmgcp.utils.config import build_detector, load_config

OUTPUTS = {'pruned.py', 'pruned.pth', 'plan.json', 'report.json', 'report.md', 'channels.png',
           'scores.png', 'network.png', 'network.html'}


def save(config, path):
    torch.manual_seed(0)
    model = build_detector(Config.fromfile(config))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.normal_(module.bias)
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)


@pytest.fixture
def files(config_files):
    """The folder with tiny.py and tiny.pth."""
    return config_files[0].parent


def tool(*arguments):
    """Run the tool in this process: its status and everything it prints."""
    result = run_here('prune.py', *arguments)
    return result.returncode, result.stdout + result.stderr


def norms(model):
    return {name: module.num_features for name, module in model.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)}


def test_outputs(files, tmp_path):
    out = tmp_path / 'deep' / 'out'
    result = run_process('prune.py', files / 'tiny.py', files / 'tiny.pth', '--work-dir', out,
                         '--input-size', 96, 64)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == OUTPUTS
    assert [path.name for path in out.parent.iterdir()] == ['out']
    assert 'stride-16' in result.stdout and str(out) in result.stdout

    report = json.loads((out / 'report.json').read_text())
    original = build_detector(Config.fromfile(files / 'tiny.py'))
    pruned = build_detector(Config.fromfile(out / 'pruned.py'))
    checkpoint = torch.load(out / 'pruned.pth', weights_only=False)
    pruned.load_state_dict(checkpoint['state_dict'], strict=True)
    assert checkpoint['meta']['dataset_meta']['classes'] == ('Platelets', 'RBC', 'WBC')
    for key, model in (('before', original), ('after', pruned)):
        counts = count_complexity(model, (3, 64, 96))
        assert (report['params'][key], report['macs'][key]) == counts
        assert {row['layer']: row[key] for row in report['layers']} == {
            name: module.out_channels for name, module in model.named_modules()
            if isinstance(module, torch.nn.Conv2d)}
    # the target of configs/_base_/prune/yolov4_groups.py
    assert report['params']['after'] == pytest.approx(
        0.353 * report['params']['before'], rel=0.01)
    assert report['options']['target_params'] == 0.353

    plan = json.loads((out / 'plan.json').read_text())
    before, after = norms(original), norms(pruned)
    for item in plan['units']:
        for layer in set(item['layers']) & set(before):
            assert before[layer] - after[layer] == len(item['removed'])
    for name in ('channels.png', 'scores.png'):
        image = cv2.imread(str(out / name))
        assert min(image.shape[:2]) > 300 and image.std() > 10
    assert '| backbone.stem.conv | stride-8 |' in (out / 'report.md').read_text()


def test_options(files, tmp_path):
    code, printed = tool(
        files / 'tiny.py', files / 'tiny.pth', '--work-dir', tmp_path / 'out', '--target-flops',
        0.6, '--no-compensate', '--cfg-options', 'prune_cfg.merge=majority')
    assert code == 0, printed
    report = json.loads((tmp_path / 'out/report.json').read_text())
    options = report['options']
    assert (options['target_params'], options['target_flops']) == (None, 0.6)
    assert options['compensate'] is False and options['merge'] == 'majority'
    assert report['macs']['after'] == pytest.approx(0.6 * report['macs']['before'], rel=0.01)
    # MACs are counted for the config's image of 320x320 pixels
    model = build_detector(Config.fromfile(files / 'tiny.py'))
    assert report['macs']['before'] == count_complexity(model, (3, 320, 320))[1]


def test_default_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--target-params', 0.5,
                         '--input-size', 64, 64)
    assert code == 0, printed
    assert {path.name for path in (tmp_path / 'work_dirs/tiny-pruned').iterdir()} == OUTPUTS


def arguments(case, files, folder):
    config, checkpoint, more = files / 'tiny.py', files / 'tiny.pth', []
    if case == 'config':
        config = folder / 'absent.py'
    elif case == 'checkpoint':
        checkpoint = folder / 'absent.pth'
    elif case == 'no checkpoint':
        return [config]
    elif case == 'broken checkpoint':
        checkpoint = folder / 'broken.pth'
        checkpoint.write_text('no checkpoint')
    elif case == 'architecture':
        checkpoint = folder / 'other.pth'
        (folder / 'other.py').write_text(config_text(widen_factor=0.0625))
        save(folder / 'other.py', checkpoint)
    elif case == 'budget':
        more = ['--target-params', 0.01, '--cfg-options', 'prune_cfg.min_keep_ratio=0.5']
    elif case == 'share':
        more = ['--target-params', 64]
    elif case == 'ratio and budget':
        more = ['--target-params', 0.5, '--ratio', 0.5]
    elif case == 'nothing asked for':
        more = ['--cfg-options', 'prune_cfg.target_params=None']
    elif case == 'prune_cfg':
        more = ['--cfg-options', 'prune_cfg.mrege=or']
    elif case == 'groups':
        more = ['--cfg-options', 'prune_cfg.groups=autom']
    elif case == 'model':
        config = folder / 'plain.py'
        config.write_text("default_scope = 'mmyolo'\nmodel = dict(type='YOLODetectro')\n")
    elif case == 'plan':
        more = ['--plan', folder / 'absent.json']
    elif case == 'metric':
        more = ['--sensitivity']
    return [config, checkpoint, *more]


@pytest.mark.parametrize('case, message', [
    ('config', 'there is no config'),
    ('checkpoint', 'there is no checkpoint'),
    ('no checkpoint', 'there is no checkpoint: give one'),
    ('broken checkpoint', 'cannot be read as a checkpoint'),
    ('architecture', 'does not fit'),
    ('budget', 'cannot be reached'),
    ('share', r'in (0, 1]'),
    ('ratio and budget', 'ratio=0.5 and target_params=0.5 exclude each other'),
    ('nothing asked for', 'no ratio or budget is given'),
    ('prune_cfg', "has an unknown option 'mrege'; did you mean 'merge'?"),
    ('groups', "groups must be 'auto'"),
    ('model', 'YOLODetectro'),
    ('plan', 'absent.json cannot be read: No such file'),
    ('metric', 'the validation data cannot be loaded'),
])
def test_request_that_cannot_be_met(case, message, files, tmp_path):
    inputs, outputs = tmp_path / 'in', tmp_path / 'out'
    inputs.mkdir()
    given = arguments(case, files, inputs)
    code, printed = tool(*given, '--work-dir', outputs)
    assert code == 1
    assert 'Traceback' not in printed and message in printed
    (line, ) = [line for line in printed.splitlines() if line.startswith('prune.py: ')]
    assert line == printed.splitlines()[-1]
    assert not outputs.exists()
    assert {path.name for path in tmp_path.iterdir()} == {'in'}


def test_one_line_on_stderr(tmp_path):
    result = run_process('prune.py', tmp_path / 'absent.py', 'x.pth', '--work-dir',
                         tmp_path / 'out')
    assert result.returncode == 1
    assert result.stderr == f'prune.py: there is no config {tmp_path}/absent.py\n'
    assert not (tmp_path / 'out').exists()


def test_failure_while_writing_leaves_nothing(files, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('no space left on the device')

    monkeypatch.setattr('mmgcp.pruning.report.plot_channels', fail)
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--work-dir', tmp_path / 'out',
                         '--target-params', 0.5, '--input-size', 64, 64)
    assert code == 1 and 'prune.py: no space left' in printed
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def planned(config_files, tmp_path_factory):
    """The folder of a network pruned to half of its parameters, without compensation."""
    folder = tmp_path_factory.mktemp('planned') / 'out'
    code, printed = tool(*config_files, '--work-dir', folder, '--target-params', 0.5,
                         '--input-size', 64, 64, '--no-compensate')
    assert code == 0, printed
    return folder


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[key], second[key])
                                               for key in first)


def test_plan_is_applied(files, planned, tmp_path):
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--plan', planned / 'plan.json',
                         '--work-dir', tmp_path / 'out', '--no-compensate')
    assert code == 0, printed
    assert same(pruned_weights(planned), pruned_weights(tmp_path / 'out'))
    assert {path.name for path in (tmp_path / 'out').iterdir()} == OUTPUTS - {'scores.png'}
    assert 'scores.png' not in (tmp_path / 'out/report.md').read_text()


def test_edited_plan(files, planned, tmp_path):
    plan = json.loads((planned / 'plan.json').read_text())
    edited = max(plan['units'], key=lambda item: len(item['removed']))
    edited['removed'] = edited['removed'][:1]
    (tmp_path / 'plan.json').write_text(json.dumps(plan))
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--plan', tmp_path / 'plan.json',
                         '--work-dir', tmp_path / 'out')
    assert code == 0, printed
    model = build_detector(Config.fromfile(tmp_path / 'out/pruned.py'))
    original = build_detector(Config.fromfile(files / 'tiny.py'))
    layer = next(name for name in edited['layers'] if name in norms(original))
    assert norms(model)[layer] == norms(original)[layer] - 1


def test_plan_of_another_architecture(files, planned, tmp_path):
    code, printed = tool(planned / 'pruned.py', '--plan', planned / 'plan.json', '--work-dir',
                         tmp_path / 'out')
    assert code == 1 and 'is it the architecture that the plan was made for?' in printed
    assert not (tmp_path / 'out').exists()


def test_dry_run_writes_nothing(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--ratio', 0.3, '--dry-run',
                         '--input-size', 64, 64)
    assert code == 0, printed
    assert 'stride-16' in printed and 'nothing has been written' in printed
    assert list(tmp_path.iterdir()) == []


def test_pruned_again(planned, tmp_path):
    code, printed = tool(planned / 'pruned.py', '--target-params', 0.5, '--input-size', 64, 64,
                         '--work-dir', tmp_path / 'again', '--round-to', 4)
    assert code == 0, printed
    first, again = (sum(x.numel() for x in pruned_weights(folder).values())
                    for folder in (planned, tmp_path / 'again'))
    assert again / first == pytest.approx(0.5, abs=0.05)
    model = build_detector(Config.fromfile(tmp_path / 'again/pruned.py'))
    model.load_state_dict(pruned_weights(tmp_path / 'again'), strict=True)
    before = norms(build_detector(Config.fromfile(planned / 'pruned.py')))
    assert all(count % 4 == 0 or count == before[name] for name, count in norms(model).items())


@pytest.fixture(
    scope='module', params=slow_except(['mmyolo'], ['mmyolo', 'mmdet'], pytest.mark.slow))
def package_files(request, tmp_path_factory):
    """A config of a package by its name, options, and a checkpoint for it."""
    config, options = dict(
        mmyolo=('mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', {}),
        mmdet=('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
               {'model.backbone.init_cfg': None}))[request.param]
    checkpoint = tmp_path_factory.mktemp('package') / 'random.pth'
    torch.manual_seed(0)
    model = build_detector(load_config(config, options))
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    return config, checkpoint, ['--cfg-options', 'randomness.seed=0',
                                *(f'{key}={value}' for key, value in options.items())]


def test_config_of_a_package(package_files, tmp_path):
    config, checkpoint, options = package_files
    code, printed = tool(config, checkpoint, '--target-flops', 0.7, '--work-dir', tmp_path / 'out',
                         '--input-size', 128, 128, *options)
    assert code == 0, printed
    (warning, ) = re.findall('warning: the calibration images cannot be loaded.*', printed)
    assert ('FileNotFoundError' in warning) == (
        f'(paths in configs start at the working directory, {os.getcwd()})' in warning)
    report = json.loads((tmp_path / 'out/report.json').read_text())
    assert report['macs']['after'] == pytest.approx(0.7 * report['macs']['before'], rel=0.01)
    moved = tmp_path / 'another machine'
    (tmp_path / 'out').rename(moved)
    model = init_detector(str(moved / 'pruned.py'), str(moved / 'pruned.pth'), device='cpu')
    assert same(model.state_dict(), pruned_weights(moved))
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    assert 'pred_instances' in inference_detector(model, image)


@pytest.mark.slow
def test_sensitivity_and_calibration_on_data(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    save(config, tmp_path / 'tiny.pth')
    code, printed = tool(
        config, tmp_path / 'tiny.pth', '--target-params', 0.5, '--sensitivity', '--val-images', 1,
        '--metric', 'pascal_voc/AP50', '--calib-batches', 1, '--criterion', 'BNScale',
        '--work-dir', tmp_path / 'out')
    assert code == 0, printed
    assert 'warning' not in printed
    report = json.loads((tmp_path / 'out/report.json').read_text())
    assert report['params']['after'] == pytest.approx(0.5 * report['params']['before'], rel=0.01)
    assert report['uncompensated'] == []
    sensitivity = report['options']['sensitivity']
    assert 0 <= sensitivity['baseline'] <= 1
    assert set(sensitivity['metrics']) == set(sensitivity['costs']) == set(report['thresholds'])
    assert all(set(values) == {'0.05', '0.2'} for values in sensitivity['metrics'].values())


def test_compensation(write_config, tmp_path):
    """By default the best that the data allow; what needs data is refused without."""
    config = write_config(tmp_path / 'tiny.py')
    save(config, tmp_path / 'tiny.pth')
    options = dict(default=(), fitted=('--compensate', 'reconstruct'),
                   squares=('--compensate', 'adapt-norms'),
                   mean=('--compensate', 'fold-means'), none=('--no-compensate', ))
    found = {}
    for name, option in options.items():
        code, printed = tool(config, tmp_path / 'tiny.pth', '--target-params', 0.5,
                             '--calib-batches', 1, '--work-dir', tmp_path / name, *option)
        assert code == 0, printed
        found[name] = pruned_weights(tmp_path / name)
    assert same(found['default'], found['fitted'])
    for first, second in itertools.combinations(('fitted', 'squares', 'mean', 'none'), 2):
        assert not same(found[first], found[second])
    for name, mode in (('squares', 'adapt-norms'), ('fitted', 'reconstruct')):
        code, printed = tool(config, tmp_path / 'tiny.pth', '--target-params', 0.5, '--work-dir',
                             tmp_path / 'out', '--calib-batches', 0, *options[name])
        assert code == 1 and mode in printed.splitlines()[-1]
        assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('mode', ['adapt-norms', 'reconstruct'])
def test_compensation_with_data_that_are_missing(mode, files, tmp_path):
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--target-params', 0.5,
                         '--compensate', mode, '--work-dir', tmp_path / 'out')
    assert code == 1 and 'calibration images cannot be loaded' in printed.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name, needs_data', [('L1Norm', False), ('Taylor', True)])
def test_criterion(name, needs_data, write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    save(config, tmp_path / 'tiny.pth')
    reports = []
    for number in range(2):
        folder = tmp_path / f'out{number}'
        code, printed = tool(
            config, tmp_path / 'tiny.pth', '--target-params', 0.5, '--criterion', name,
            '--calib-batches', 1, '--work-dir', folder)
        assert code == 0, printed
        # where all layers lose the same share, there are no scores to compare with a threshold
        assert {path.name for path in folder.iterdir()} == OUTPUTS - (
            {'scores.png'} if name in ('L1Norm', 'Taylor') else set())
        reports.append(json.loads((folder / 'report.json').read_text()))
    report = reports[0]
    assert report == reports[1]
    assert report['options']['criterion'] == dict(type=f'mmgcp.{name}')
    assert report['params']['after'] == pytest.approx(0.5 * report['params']['before'], rel=0.01)
    code, printed = tool(
        config, tmp_path / 'tiny.pth', '--target-params', 0.5, '--criterion', name,
        '--calib-batches', 0, '--work-dir', tmp_path / 'none')
    if needs_data:
        assert code == 1
        assert 'Taylor needs training data' in printed.splitlines()[-1]
        assert not (tmp_path / 'none').exists()
    else:
        assert code == 0, printed


def test_uniform_allocation(files, tmp_path):
    code, printed = tool(
        files / 'tiny.py', files / 'tiny.pth', '--ratio', 0.5, '--calib-batches', 0,
        '--allocation', 'uniform', '--round-to', 1, '--work-dir', tmp_path / 'out')
    assert code == 0, printed
    assert {path.name for path in (tmp_path / 'out').iterdir()} == OUTPUTS - {'scores.png'}
    plan = PruningPlan.load(tmp_path / 'out/plan.json')
    assert plan.options['allocation'] == 'uniform'
    assert all(abs(len(item.removed) - item.size / 2) <= 0.5 for item in plan.units)


def test_criterion_whose_data_are_missing(files, tmp_path):
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--criterion', 'APoZ',
                         '--work-dir', tmp_path / 'out')
    assert code == 1 and 'prune.py: the calibration images cannot be loaded' in printed
    assert list(tmp_path.iterdir()) == []


def test_criteria_in_the_help():
    code, _ = tool('--help')
    assert code == 0
    names = criterion_names()
    assert set(names) >= {
        'APoZ', 'BNScale', 'FPGM', 'GroupFisher', 'L1Norm', 'L2Norm', 'Random', 'Taylor'}
    assert not [name for name in names if 'Criterion' in name]


def test_unknown_criterion(files, tmp_path):
    code, printed = tool(files / 'tiny.py', files / 'tiny.pth', '--criterion', 'L3Norm',
                         '--work-dir', tmp_path / 'out')
    assert code == 2 and 'L3Norm' in printed and 'L2Norm' in printed
    assert list(tmp_path.iterdir()) == []


def test_unknown_metric(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    save(config, tmp_path / 'tiny.pth')
    code, printed = tool(config, tmp_path / 'tiny.pth', '--sensitivity', '--metric', 'mAP',
                         '--val-images', 1, '--work-dir', tmp_path / 'out')
    assert code == 1 and "there is no metric 'mAP'; there are pascal_voc/mAP" in printed
    assert not (tmp_path / 'out').exists()
