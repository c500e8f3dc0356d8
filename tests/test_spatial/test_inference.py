# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Kept cells are those of the dense detector, and dropped cells predict nothing."""
import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import family_config
from mmdet.structures import DetDataSample
from spatial_samples import build, images, p2_config, raw, set_masks, with_pruner
from tiers import slow_except

from mmgcp.errors import UserError
from mmgcp.nn.hooks import on_outputs
from mmgcp.spatial import find_inference
from mmgcp.utils.config import build_detector

KINDS = ('cls', 'bbox', 'obj')


@pytest.fixture(scope='module', params=['yolov4', 'yolov5'])
def original(request, modules):
    return build(with_pruner(p2_config(request.param), levels=[4, 8], tau=0.5))


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def change(model, **settings):
    inference = find_inference(model)
    inference.settings = replace(inference.settings, **settings)
    return inference


@torch.no_grad()
def expected_keep(model, inputs, tau):
    """The kept cells of the levels of stride 4 and 8, by the dense maps of the neck."""
    maps = model.extract_feat(inputs)
    decided = {}
    for level, stride in ((1, 8), (2, 16)):
        conv = model.spatial_masks[str(stride)]
        logits = F.conv2d(maps[level], conv.weight, conv.bias)
        decided[stride] = (1 - logits.sigmoid() <= tau).double()
    middle = F.interpolate(decided[16], scale_factor=2, mode='nearest')
    fine = F.interpolate(decided[8] * middle, scale_factor=2, mode='nearest')
    return [fine.bool(), middle.bool()]


@torch.no_grad()
def dense(model, inputs):
    return model(inputs, mode='tensor')


def assert_pruned(found, whole, keeps):
    """Kept cells are as in the whole, dropped ones have no score, other levels are the same."""
    for kind, levels, dense_levels in zip(KINDS, found, whole):
        for level, (got, want) in enumerate(zip(levels, dense_levels)):
            assert got.shape == want.shape
            if level >= len(keeps):
                assert torch.equal(got, want)
                continue
            keep = keeps[level].expand_as(got)
            assert torch.allclose(got[keep], want[keep], rtol=1e-9, atol=1e-9)
            dropped = got[~keep]
            assert (dropped == 0).all() if kind == 'bbox' else (dropped.sigmoid() == 0).all()


@pytest.mark.parametrize('number, height, width', [(1, 128, 128), (3, 96, 160), (2, 128, 224)])
def test_kept_cells(model, number, height, width):
    """Sides of 24 to 56 cells: no multiple of the tile but for one."""
    inputs = images(number, height, width)
    keeps = expected_keep(model, inputs, 0.5)
    assert all(0.02 < keep.double().mean() < 0.98 for keep in keeps)
    assert_pruned(raw(model, inputs), dense(model, inputs), keeps)


def decide(monkeypatch, cells):
    """Let stride 8 keep some cells (image, row, column) of 2 x 20 x 20, and stride 16 all."""
    decided = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    for image, row, column in cells:
        decided[image, 0, row, column] = True
    monkeypatch.setattr(
        'mmgcp.spatial.inference.kept_cells', lambda logits, tau: decided if (
            logits.shape[-1] == 20) else torch.ones_like(logits, dtype=torch.bool))
    return [decided.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.ones_like(decided)]


def test_single_cells(model, monkeypatch):
    """In the corners, at the edges and in the middle, of one image of the batch."""
    inputs = images(2, 160, 160)
    whole = dense(model, inputs)
    for row, column in ((0, 0), (0, 19), (19, 0), (19, 19), (0, 9), (8, 19), (10, 10)):
        keeps = decide(monkeypatch, [(1, row, column)])
        assert_pruned(raw(model, inputs), whole, keeps)
        assert find_inference(model).computed == {4: 1 / 18, 8: 1.}


def test_only_tiles_are_computed(model, monkeypatch):
    """The share that is said is that of the cells that a layer of the finest level sees."""
    seen, inputs, inference = [], images(2, 160, 160), find_inference(model)
    decide(monkeypatch, [(0, 0, 0), (0, 7, 7), (1, 8, 7), (1, 19, 19)])
    with on_outputs(model, {'neck.finer.fusion': lambda _, output: seen.append(output.shape)}):
        raw(model, inputs)
    size = 16 + 2 * inference.layers[0].halo
    assert {tuple(shape[2:]) for shape in seen} == {(size, size)}
    assert sum(shape[0] for shape in seen) == 3  # the first two cells are in one tile
    assert inference.computed[4] == 3 / 18 and inference.kept[4] == pytest.approx(16 / 3200)


def test_nothing_is_dropped_at_tau_one(model):
    inference = change(model, tau=1.)
    inputs = images(2, 96, 160)
    keeps = [torch.ones(2, 1, 24, 40, dtype=torch.bool), torch.ones(2, 1, 12, 20, dtype=torch.bool)]
    assert_pruned(raw(model, inputs), dense(model, inputs), keeps)
    assert inference.kept == inference.computed == {4: 1., 8: 1.}
    model.float()
    for found, whole in zip(predict(model, inputs), predict_dense(model, inputs)):
        assert len(found) > 0
        assert_same_detections(found, whole)


@pytest.mark.parametrize('kind', ['all', 'none'])
def test_all_or_none(model, kind):
    inference, inputs = find_inference(model), images(2, 96, 160)
    set_masks(model, kind == 'all')
    keeps = [torch.full((2, 1, 24 // step, 40 // step), kind == 'all') for step in (1, 2)]
    assert_pruned(raw(model, inputs), dense(model, inputs), keeps)
    assert set(inference.computed.values()) == {float(kind == 'all')}


def samples_for(inputs):
    size = tuple(inputs.shape[2:])
    return [DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1., 1.),
                                        batch_input_shape=size)) for _ in inputs]


@torch.no_grad()
def predict(model, inputs):
    samples = model(inputs.float(), samples_for(inputs), mode='predict')
    return [sample.pred_instances for sample in samples]


@torch.no_grad()
def predict_dense(model, inputs, keeps=None):
    """The detections of the dense raw predictions, of which some have no objectness.

    MMCV's NMS needs single precision.
    """
    outputs = [list(kind) for kind in dense(model, inputs.float())]
    for level, keep in enumerate(keeps or []):
        outputs[2][level] = torch.where(keep, outputs[2][level], torch.tensor(-float('inf')))
    metas = [sample.metainfo for sample in samples_for(inputs)]
    return model.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=True)


def assert_same_detections(found, expected):
    assert len(found) == len(expected)
    for name in ('bboxes', 'scores', 'labels'):
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_detections(model):
    """They are those of the dense detector in which dropped cells find nothing."""
    inputs = images(2, 128, 160)
    found = predict(model.float(), inputs)
    keeps = expected_keep(model, inputs.float(), 0.5)
    for got, want, whole in zip(found, predict_dense(model, inputs, keeps),
                                predict_dense(model, inputs)):
        assert len(got) > 0
        assert_same_detections(got, want)
        assert len(got) != len(whole) or not torch.equal(got.scores, whole.scores)


def test_dense_where_most_tiles_are_kept(model):
    change(model, dense_above=0.01)
    inputs = images(1, 128, 128)
    seen, keeps = [], expected_keep(model, inputs, 0.5)
    with on_outputs(model, {'neck.finer.fusion': lambda _, output: seen.append(output.shape)}):
        found = raw(model, inputs)
    assert [tuple(shape[2:]) for shape in seen] == [(32, 32)]
    assert_pruned(found, dense(model, inputs), keeps)


@pytest.mark.parametrize('duplicate', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_masks_of_their_own(model, duplicate):
    inputs = images(1, 64, 64)
    before = raw(model, inputs)
    twin = duplicate(model)
    assert all(torch.equal(a, b) for new, old in zip(raw(twin, inputs), before)
               for a, b in zip(new, old))
    set_masks(twin, False)
    assert find_inference(twin).masks is twin.spatial_masks
    predict(twin.float(), inputs)
    assert find_inference(twin).kept[4] == 0
    assert all(torch.equal(a, b) for new, old in zip(raw(model, inputs), before)
               for a, b in zip(new, old))


def test_left_as_it_was_after_an_error(model):
    """Which one of the neck's hooks raises behind the finer level."""
    model, inputs = model.float(), images(1, 64, 64).float()
    before = dense(model, inputs)

    def fail(*_):
        raise KeyError

    handle = model.neck.finer.register_forward_hook(fail)
    with pytest.raises(KeyError):
        predict(model, inputs)
    handle.remove()
    assert all(torch.equal(a, b) for new, old in zip(dense(model, inputs), before)
               for a, b in zip(new, old))
    assert 'forward' not in vars(model.neck.finer)


@pytest.mark.parametrize('name', ['yolov4', 'yolov5'])
def test_everything_but_predicting_is_dense(name):
    """As of the detector without a pruner, whatever the masks say."""
    plain = build(p2_config(name))
    model = build(with_pruner(p2_config(name), levels=[4, 8], tau=0.5))
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs = images(1, 64, 64)
    assert not same(raw(model, inputs), dense(plain, inputs))
    assert same(dense(model, inputs), dense(plain, inputs))
    assert same([model.extract_feat(inputs)], [plain.extract_feat(inputs)])
    with torch.no_grad():
        outputs = model.train()(inputs, mode='tensor')
        assert same(raw(model, inputs), outputs)
        assert same(outputs, plain.train()(inputs, mode='tensor'))


def same(outputs, expected):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9)
               for new, old in zip(outputs, expected) for a, b in zip(new, old))


OTHERS = slow_except(['yolov8-n'], ['yolov8-n', 'yolov6-n', 'yolov7-tiny', 'yolox-nano',
                                    'rtmdet-tiny', 'yolov5-n-p6'])


@pytest.mark.parametrize('name', OTHERS)
def test_other_families(name):
    """The head of stride 8, and what is before it in some necks, decided by stride 16."""
    model = build(with_pruner(family_config(name), tau=0.5))
    inputs, inference = images(2, 128, 192), find_inference(model)
    keep = kept_by_stride_16(model, model.extract_feat(inputs))
    assert 0.2 < keep.double().mean() < 0.8
    assert_pruned(raw(model, inputs), dense(model, inputs), [keep])
    assert set(inference.computed) == {8}


@torch.no_grad()
def kept_by_stride_16(model, maps):
    logits = model.spatial_masks['16'](maps[1])
    return F.interpolate((1 - logits.sigmoid() <= 0.5).double(), scale_factor=2).bool()


def test_layers_that_look_at_the_whole_map():
    """The head of PPYOLOE weighs channels by their means."""
    with pytest.raises(UserError, match='stride 8 cannot be computed tile by tile'):
        build_detector(with_pruner(family_config('ppyoloe-plus-s')))
