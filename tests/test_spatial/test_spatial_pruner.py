# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The detector with a pruner: an ordinary one, in training, in checkpoints, with the tools."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from scripts import run_here
from spatial_samples import CONFIGS, NARROW, build, images, p2_config, raw, with_pruner
from yolov4_samples import DATA_TEXT, yolov4

from mmgcp.datasets.demo import CLASSES
from mmgcp.deployment import export_detector
from mmgcp.errors import PruningError, UserError
from mmgcp.pruning import prune
from mmgcp.pruning.detector import make_pruned_config, registered_name
from mmgcp.registry import MODELS
from mmgcp.spatial import find_inference
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.config import build_detector, load_config

BOXES = torch.tensor([[0, 1, 4, 4, 20, 24], [1, 2, 10, 20, 90, 100], [1, 0, 40, 50, 70, 76]])


def batch(size=96):
    return images(2, size, size).float(), dict(
        bboxes_labels=BOXES.float(), img_metas=[dict(batch_input_shape=(size, size))] * 2)


@pytest.fixture(scope='module', params=['yolov4', 'yolov5'])
def name(request):
    return request.param


@pytest.fixture
def pair(name):
    """The dense detector and one with a pruner, with the same weights."""
    dense = build(p2_config(name)).float()
    pruned = build(with_pruner(p2_config(name), levels=[4, 8])).float()
    pruned.load_state_dict(dense.state_dict(), strict=False)
    return dense, pruned


def test_an_ordinary_detector(pair):
    dense, pruned = pair
    assert type(pruned) is type(dense)
    masks = {'spatial_masks.8.weight', 'spatial_masks.8.bias', 'spatial_masks.16.weight',
             'spatial_masks.16.bias'}
    assert set(pruned.state_dict()) - set(dense.state_dict()) == masks
    assert set(dense.state_dict()) <= set(pruned.state_dict())


def test_same_initial_weights(name):
    """With the same seed, as if there were no pruner."""
    weights = []
    for cfg in (p2_config(name), with_pruner(p2_config(name))):
        torch.manual_seed(0)
        model = build_detector(cfg)
        model.init_weights()
        weights.append({key: value for key, value in model.state_dict().items()
                        if not key.startswith('spatial_masks')})
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_losses(pair):
    """They are those of the dense detector and, as worked out here, that of the masks."""
    dense, pruned = pair
    inputs, samples = batch()
    expected = dense.train()(inputs, batch()[1], mode='loss')
    maps = [map_.detach() for map_ in pruned.train().extract_feat(inputs)]
    losses = pruned(inputs, samples, mode='loss')
    assert set(losses) == {*expected, 'loss_spatial'}
    for key, value in expected.items():
        assert torch.allclose(losses[key], value, rtol=1e-4)
    levels = []
    # Below 32 pixels: the first and the last box; below 64: also these alone
    for level, stride in ((1, 8), (2, 16)):
        conv, cells = pruned.spatial_masks[str(stride)], 96 // stride
        truth = torch.zeros(2, cells, cells)
        for image, x, y in ((0, 12, 14), (1, 55, 63)):
            row, column = y // stride, x // stride
            truth[image, max(row - 3, 0):row + 4, max(column - 3, 0):column + 4] = 1
        p = F.conv2d(maps[level], conv.weight, conv.bias)[:, 0].sigmoid().detach()
        levels.append(-(0.25 * truth * (1 - p)**2 * p.log()
                        + 0.75 * (1 - truth) * p**2 * (1 - p).log()).mean())
    assert math.isclose(float(losses['loss_spatial']), 0.01 * 2 * float(sum(levels)) / 2,
                        rel_tol=2e-3)
    losses['loss_spatial'].backward()
    assert all(conv.weight.grad.abs().sum() > 0 for conv in pruned.spatial_masks.values())
    assert pruned.neck.reduce_layers[2].training


def test_losses_of_both_kinds_of_samples(pair):
    _, pruned = pair
    inputs, samples = batch()
    found = pruned.train()(inputs, samples, mode='loss')['loss_spatial']
    samples = [DetDataSample(
        gt_instances=InstanceData(bboxes=rows[:, 2:].float(), labels=rows[:, 1]),
        metainfo=dict(batch_input_shape=(96, 96))) for rows in (BOXES[:1], BOXES[1:])]
    again = pruned(inputs, samples, mode='loss')['loss_spatial']
    assert torch.allclose(found, again, rtol=1e-3)


@pytest.mark.slow
def test_masks_learn(name):
    """Where the boxes are, after some steps on one batch."""
    model = build_detector(with_pruner(p2_config(name), levels=[4], loss_weight=1.)).train()
    torch.manual_seed(0)
    model.init_weights()
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(25):
        loss = model(*batch(), mode='loss')['loss_spatial']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 5


def save(model, path):
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return str(path)


def test_checkpoints_in_both_directions(pair, tmp_path, capsys):
    dense, pruned = pair
    paths = [save(model, tmp_path / f'{number}.pth') for number, model in enumerate(pair)]
    torch.nn.init.zeros_(dense.neck.finer.reduce.conv.weight)
    load_strictly(dense, paths[1], 'dense.py')
    assert ('spatial_masks.8, spatial_masks.16 of ' + paths[1] + ' are not used: dense.py '
            in capsys.readouterr().out)
    assert torch.equal(dense.neck.finer.reduce.conv.weight, pruned.neck.finer.reduce.conv.weight)
    before = pruned.spatial_masks['8'].weight.clone()
    torch.nn.init.zeros_(pruned.neck.finer.reduce.conv.weight)
    load_strictly(pruned, paths[0])
    assert ('the mask convolutions spatial_masks.8, spatial_masks.16 are not in ' + paths[0]
            in capsys.readouterr().out)
    assert torch.equal(pruned.neck.finer.reduce.conv.weight, dense.neck.finer.reduce.conv.weight)
    assert torch.equal(pruned.spatial_masks['8'].weight, before)
    load_strictly(pruned, paths[1])
    assert capsys.readouterr().out == ''


def test_checkpoint_of_more_levels(pair, name, tmp_path, capsys):
    path = save(pair[1], tmp_path / 'a.pth')
    fewer = build_detector(with_pruner(p2_config(name), levels=[4]))
    load_strictly(fewer, path)
    assert 'convolutions spatial_masks.16 of ' in capsys.readouterr().out
    assert torch.equal(fewer.spatial_masks['8'].weight, pair[1].spatial_masks['8'].weight)
    load_strictly(pair[1], save(fewer, tmp_path / 'b.pth'))
    assert 'convolutions spatial_masks.16 are not in ' in capsys.readouterr().out


def test_nothing_else_may_be_missing(pair, tmp_path):
    dense, pruned = pair
    state = dense.state_dict()
    del state['neck.finer.reduce.conv.weight']
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'1 missing \(neck.finer.reduce.conv.weight\)'):
        load_strictly(pruned, str(tmp_path / 'a.pth'))


def test_new_masks_keep_all(name):
    model = build_detector(with_pruner(p2_config(name), levels=[4, 8])).eval()
    raw(model, images(1, 96, 96).float())
    assert find_inference(model).kept == {4: 1., 8: 1.}


def test_with_channel_pruning(name):
    """The pruned detector in the pruner: tau 1 is the pruned detector."""
    cfg = p2_config(name)
    model = build(cfg).float()
    result = prune(model, ratio=0.4, groups='auto', criterion=dict(type='mmgcp.L1Norm'),
                   compensate=False, input_shape=(3, 64, 64))
    pruned_cfg = make_pruned_config(cfg, registered_name(type(model)), result.changed_channels)
    assert any(key.startswith('neck.finer') for key in result.changed_channels)
    wrapped = build_detector(with_pruner(pruned_cfg, levels=[4, 8], tau=1.)).eval()
    wrapped.load_state_dict(result.model.state_dict(), strict=False)
    wrapped, plain = wrapped.double(), result.model.double().eval()
    inputs = images(2, 96, 160)
    with torch.no_grad():
        expected = plain(inputs, mode='tensor')
    for found, whole in zip(raw(wrapped, inputs), expected):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, whole))


def test_detectors_with_pruner_are_not_pruned(pair):
    with pytest.raises(PruningError, match='without mmgcp.SpatialPruner'):
        prune(pair[1], ratio=0.5, groups='auto', criterion=dict(type='mmgcp.L1Norm'))


def test_detectors_with_pruner_are_not_exported(pair, tmp_path):
    with pytest.raises(UserError, match='is not exported.*config of the dense'):
        export_detector(pair[1], Config(), tmp_path / 'a.onnx', (3, 64, 64))
    assert not list(tmp_path.iterdir())


def test_distilled(pair, name, tmp_path):
    """As the student of a dense teacher, whose neck's finest output is compared, too."""
    dense, _ = pair
    cfg = p2_config(name)
    path = save(dense, tmp_path / 'teacher.pth')
    student = with_pruner(cfg, levels=[4]).model
    model = MODELS.build(dict(
        type='mmgcp.SpatialAttentionDistiller', student=student,
        teacher=dict(config=cfg.model, checkpoint=path),
        groups=[dict(name='neck', weight=1., layers='neck_outputs')])).train()
    inputs, samples = batch()
    losses = model(inputs, samples, mode='loss')
    assert {'loss_attention_neck', 'loss_spatial'} < set(losses)
    sum(value.sum() for value in losses.values()).backward()
    assert model.spatial_masks['8'].weight.grad.abs().sum() > 0
    assert set(model.state_dict()) == set(build_detector(with_pruner(cfg, levels=[4])).state_dict())


@pytest.mark.parametrize('settings, words', [
    (dict(levels=[8]), 'smallest strides of the head'), (dict(levels=[4, 16]), r'\[4, 8, 16, 32\]'),
    (dict(levels=[4, 8, 16, 32]), 'without its largest one'),
    (dict(tile=18), 'multiple of 4'), (dict(window=4), 'odd number'), (dict(tau=2), 'tau')])
def test_wrong_settings(settings, words):
    with pytest.raises(UserError, match=words):
        build_detector(with_pruner(p2_config('yolov4'), **settings))


def test_other_detectors():
    cfg = Config(dict(model=dict(yolov4(), type='mmgcp.SpatialPruner',
                                 detector_type='YOLODetector', neck=None)))
    with pytest.raises(UserError, match='the parts of a detector of MMYOLO'):
        build_detector(cfg)


def config_file(folder, demo_root, name):
    """The config of the repository with a pruner, made small, on the demo's images."""
    path = str(CONFIGS[name]).replace('-p2_', '-p2-spatial_')
    factors = dict(widen_factor=next(iter(NARROW.values())), deepen_factor=0.33)
    text = (f'_base_ = {path!r}\nmodel = dict(backbone={factors}, neck={factors},\n'
            '    bbox_head=dict(head_module=dict('
            f'num_classes={len(CLASSES)}, widen_factor={factors["widen_factor"]})))\n')
    text += DATA_TEXT.format(data_root=str(demo_root), classes=CLASSES)
    (folder / 'small.py').write_text(text)
    return folder / 'small.py'


@pytest.mark.slow
def test_tools(demo_root, tmp_path):
    """Training, testing with another tau, and testing as the dense detector."""
    path = config_file(tmp_path, demo_root, 'yolov4')
    result = run_here('train.py', path, '--work-dir', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    state = torch.load(tmp_path / 'out/epoch_1.pth', weights_only=False)['state_dict']
    assert 'spatial_masks.16.weight' in state
    cfg = load_config(str(path))
    dense = tmp_path / 'dense.py'
    model = {key: value for key, value in cfg.to_dict()['model'].items()
             if key not in ('detector_type', 'spatial_cfg')}
    dense.write_text(f'_base_ = {str(path)!r}\n'
                     f'model = dict(_delete_=True, **{dict(model, type="YOLODetector")!r})\n')
    for config, options in ((path, ('--cfg-options', 'model.spatial_cfg.tau=1.0')), (dense, ())):
        result = run_here('test.py', config, tmp_path / 'out/epoch_1.pth', '--work-dir',
                          tmp_path / f'test-{config.stem}', *options)
        assert result.returncode == 0, result.stderr
    assert 'are not used' in result.stdout
    found, dense = (json.loads((tmp_path / f'test-{name}/metrics.json').read_text())
                    for name in ('small', 'dense'))
    assert found['pascal_voc/mAP'] == pytest.approx(dense['pascal_voc/mAP'], abs=1e-6)
    result = run_here('prune.py', path, tmp_path / 'out/epoch_1.pth', '--ratio', 0.3,
                      '--no-compensate', '--criterion', 'L1Norm', '--work-dir', tmp_path / 'pruned')
    assert result.returncode == 1 and 'without mmgcp.SpatialPruner' in result.stderr
    result = run_here('export.py', path, tmp_path / 'out/epoch_1.pth', tmp_path / 'a.onnx')
    assert result.returncode == 1 and 'config of the dense' in result.stderr
