# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Attention in training, and its mean scales as scores."""
import copy
from operator import itemgetter

import pytest
import torch
import torch.nn as nn
from families import compute_loss, family_config
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmyolo.models import YOLODetector
from pruning_samples import Block, Toy, difference, randomise, run
from scripts import run_here
from torch.utils.data import DataLoader
from yolov4_samples import batch, build, yolov4

from mmgcp.attention import (
    CPSCA,
    InsertedAttention,
    attention_aside,
    find_attention,
    plain_config,
)
from mmgcp.attention.blocks import find_blocks
from mmgcp.datasets.demo import CLASSES
from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import LayerGroup, prune
from mmgcp.pruning.detector import make_pruned_config
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import channels_off
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import build_detector, load_config

SHAPE = (3, 64, 64)
EVERYTHING = ('backbone', 'neck', 'bbox_head')
LAYER = 'backbone.stage2.0.conv'  # alone in its unit
ATTENTION_TEXT = """
model.update(type='mmgcp.SCADetector', detector_type=_base_.model.type,
             attention=dict(num_groups=4))
prune_cfg = dict(groups='auto', ratio=0.3, target_params=None)
"""


def with_attention(config, **attention):
    config = copy.deepcopy(dict(config))
    return dict(config, type='mmgcp.SCADetector', detector_type=config['type'],
                attention=attention)


def small(**attention):
    return with_attention(yolov4(deepen_factor=0.1), **attention)


def vary(model, seed=0, spread=0.7):
    """Give a model attention as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.sca.parameters():
            param += spread * torch.randn(param.shape, generator=generator)
    return model


@pytest.fixture(scope='module')
def trained(modules):
    return vary(build(small()))


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def images(number, seed=0):
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def batches(*sizes):
    return [Batch(part, []) for part in images(sum(sizes)).split(sizes)]


def silent(stage, done, steps):
    assert 0 <= done <= steps


def plain_of(model):
    model = copy.deepcopy(model)
    model.sca.take_out(model)
    return model


def prepared(model, data, **options):
    criterion = CPSCA(**options)
    criterion.prepare(model, [], data, silent)
    return criterion


def all_scores(criterion, model, units):
    return {unit.name: criterion(model, unit) for unit in units}


def test_detector(trained):
    """It is the plain one, with attention in addition to everything else."""
    plain = build(yolov4(deepen_factor=0.1))
    assert type(trained) is type(plain) is YOLODetector
    own = [key for key in trained.state_dict() if not key.startswith('sca.')]
    assert own == list(plain.state_dict())
    assert [name for name, _ in trained.named_children()] == [
        'data_preprocessor', 'backbone', 'neck', 'bbox_head', 'sca']
    assert len(trained.sca) > 30
    plain.load_state_dict({key: trained.state_dict()[key] for key in own})
    assert difference(run(plain), run(trained)) > 1e-2
    assert difference(run(plain), run(plain_of(trained))) == 0


def test_random_numbers_stay_the_same():
    torch.manual_seed(3)
    plain = build(yolov4(deepen_factor=0.1))
    model = build(small(modules=['neck'], num_groups=2))
    assert torch.equal(model.backbone.stem.conv.weight, plain.backbone.stem.conv.weight)
    assert all(block.startswith('neck.') for block in model.sca.producers)
    assert {module.spatial.groups for module in model.sca.values()} == {2}


def test_predictions(trained):
    """Predictions are made with attention, as in training."""
    samples = [DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64),
                                           pad_param=(0, 0, 0, 0), scale_factor=(1., 1.)))
               for _ in range(2)]
    data = dict(inputs=list(batch()['inputs']), data_samples=samples)
    with torch.no_grad():
        results = copy.deepcopy(trained).eval().test_step(copy.deepcopy(data))
        others = plain_of(trained).eval().test_step(data)
    assert len(results) == 2 and len(results[0].pred_instances) > 0
    assert not torch.equal(results[0].pred_instances.scores, others[0].pred_instances.scores)


def test_structure_is_that_of_the_plain_detector(model):
    plain, before = plain_of(model), run(model)
    expected = find_units(plain)
    with attention_aside(model, put_back=True):
        found = find_units(model)
    assert difference(run(model), before) == 0
    assert [(item.name, item.size) for item in found[0]] == [
        (item.name, item.size) for item in expected[0]]
    assert len(found[0]) > 20 and found[1] == expected[1]


def test_scores_are_mean_scales(model):
    """For each image, no matter how the images are split into batches."""
    units, _ = find_units(plain_of(model))
    seen = {block: [] for block in model.sca.producers}
    handles = [model.sca.of_block(block).channel.register_forward_hook(
        lambda gate, args, output, block=block: seen[block].append(output[0].clone()))
        for block in seen]
    for image in images(5):
        with torch.no_grad():
            model.eval()(image[None], mode='tensor')
    for handle in handles:
        handle.remove()
    state = copy.deepcopy(model.state_dict())
    scores = all_scores(prepared(model, batches(5)), model, units)
    by_hand = {layer: sum(seen[block]) / 5 for block, layer in model.sca.producers.items()}
    compared = set()
    for unit in units:
        producers = {item.module: item for item in unit.side('out')
                     if isinstance(model.get_submodule(item.module), nn.Conv2d)}
        assert set(scores[unit.name]) == set(producers)
        for layer, row in scores[unit.name].items():
            item = producers[layer]
            assert torch.allclose(row[item.unit_index], by_hand[layer][item.channels], atol=1e-6)
            absent = torch.ones(unit.size, dtype=torch.bool)
            absent[item.unit_index] = False
            assert row[absent].isnan().all() and row[~absent].std() > 0.02
            compared.add(layer)
    assert compared == set(by_hand)
    split = all_scores(prepared(model, iter(batches(1, 3, 1))), model, units)
    assert all(torch.allclose(row, split[name][layer], equal_nan=True, atol=1e-6)
               for name, rows in scores.items() for layer, row in rows.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_layer_that_runs_several_times():
    """In two blocks, of which one runs twice: the mean over all runs."""
    model = randomise(Toy(lambda net, x: [net.pred(net.a(x)), net.pred(net.a(x[:, :, ::2])),
                                          net.pred(net.b(x))],
                          a=Block(3, 6), b=Block(3, 6), pred=nn.Conv2d(6, 2, 1)))
    model.b.conv = model.a.conv
    assert find_blocks(model) == {'a.bn': 'a.conv', 'b.bn': 'a.conv'}
    units, _ = find_units(model)
    InsertedAttention(find_blocks(model), {'a.bn': 6, 'b.bn': 6}).insert(model)
    vary(model)
    scales = []
    for module in model.sca.values():
        module.channel.register_forward_hook(lambda gate, args, output: scales.append(output))
    criterion = prepared(model, batches(2))
    assert len(scales) == 3
    (unit, ) = units
    assert torch.allclose(criterion(model, unit)['a.conv'], torch.cat(scales).mean(0))


def closed(model, layer, channel):
    """Make the attention close a channel for all images."""
    block = next(block for block, name in model.sca.producers.items() if name == layer)
    with torch.no_grad():
        model.sca.of_block(block).channel.mean_norm.bias[channel] -= 40


def prune_plain(model, *args, dry_run=False, **options):
    """Prune without the attention, as tools/prune.py does."""
    with attention_aside(model, put_back=dry_run):
        return prune(model, *args, dry_run=dry_run, **options)


def pruned(model, fold_scales=True, threshold=0.02, **options):
    group = LayerGroup('all', EVERYTHING, threshold=threshold)
    return prune_plain(model, [group], criterion=dict(type='mmgcp.CPSCA', fold_scales=fold_scales),
                       batches=batches(3, 2), compensate=False, input_shape=SHAPE, **options)


def test_closed_channel_goes_first(model):
    closed(model, LAYER, 5)
    plain = plain_of(model)
    result = pruned(model, fold_scales=False)
    assert {name: channels.tolist() for name, channels in result.plan.removed().items()} == {
        LAYER: [5]}
    assert type(result.model) is YOLODetector and result.model is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())
    assert set(vars(model)) == set(vars(plain))
    units, _ = find_units(plain)
    zeroed = plain.double().eval()
    with channels_off(zeroed, units, {LAYER: torch.tensor([5])}):
        x = torch.rand(2, *SHAPE, dtype=torch.double)
        expected = zeroed(x, mode='tensor')
    found = copy.deepcopy(model).double().eval()(x, mode='tensor')
    assert max(float((a - b).abs().max())
               for ours, theirs in zip(found, expected) for a, b in zip(ours, theirs)) < 1e-9


def test_folding_keeps_the_output(model):
    """Also without a channel that the attention closes, which its reader hardly sees."""
    closed(model, LAYER, 5)
    expected, unfolded = run(model), copy.deepcopy(model)
    pruned(unfolded, fold_scales=False)
    pruned(model)
    far, near = difference(run(unfolded), expected), difference(run(model), expected)
    assert near < 0.5 * far
    for kind in range(3):  # all levels of classes, boxes and objectness
        assert difference(run(model)[3 * kind:3 * kind + 3],
                          expected[3 * kind:3 * kind + 3]) < difference(
            run(unfolded)[3 * kind:3 * kind + 3], expected[3 * kind:3 * kind + 3])


def test_folding_of_constant_scales_is_exact():
    """Those that training starts with."""
    model = build(small(initial_scale=0.6))
    expected = run(model)
    assert difference(run(plain_of(model)), expected) > 0.1
    pruned(model)
    assert difference(run(model), expected) < 1e-4


@pytest.mark.parametrize('case', ['dry run', 'error', 'no images'])
def test_detector_keeps_its_attention_unless_it_is_pruned(model, case):
    state, before, attributes = copy.deepcopy(model.state_dict()), run(model), set(vars(model))
    if case == 'dry run':
        result = pruned(model, dry_run=True, threshold=0.6)
        assert len(result.plan.removed()) > 5
    elif case == 'error':
        with pytest.raises(PruningError, match='cannot be reached'):
            prune_plain(model, criterion=dict(type='mmgcp.CPSCA'), batches=batches(1),
                        input_shape=SHAPE, target_params=0.01, min_keep_ratio=0.9)
    else:
        with pytest.raises(PruningError, match='there are no batches of training data'):
            prune_plain(model, criterion=dict(type='mmgcp.CPSCA'), batches=[], ratio=0.5,
                        input_shape=SHAPE)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert difference(run(model), before) == 0 and set(vars(model)) == attributes
    assert find_attention(model) is model.sca


def test_other_criterion_drops_the_attention(model):
    plain = plain_of(model)
    for net in (model, plain):
        prune_plain(net, ratio=0.3, input_shape=SHAPE)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[key])
               for key, value in model.state_dict().items())


def test_pruning_asks_to_take_the_attention_out(model):
    before = run(model)
    with pytest.raises(PruningError, match=r'sca .* only for training .*attention_aside\(model\)'):
        prune(model, ratio=0.3, input_shape=SHAPE)
    assert difference(run(model), before) == 0


def test_detector_without_attention(trained):
    with pytest.raises(PruningError, match='was trained with attention, but this one has none'):
        prepared(plain_of(trained), batches(1))


def test_is_registered():
    criterion = TASK_UTILS.build(dict(type='mmgcp.CPSCA', fold_scales=False))
    assert isinstance(criterion, CPSCA) and criterion.needs == 'images'
    assert not criterion.fold_scales and CPSCA().fold_scales


@pytest.mark.parametrize('family', ['yolov5-n', 'rtmdet-tiny'])
def test_families(family):
    cfg = family_config(family)
    cfg.model = ConfigDict(with_attention(cfg.model.to_dict(), num_groups=4))
    model = vary(randomise(build_detector(cfg)))
    compute_loss(model, 128).backward()
    assert all(param.grad.abs().sum() > 0 for name, param in model.sca.named_parameters()
               if name.startswith(('backbone', 'neck')))
    kind, before = type(model), sum(param.numel() for param in plain_of(model).parameters())
    result = prune_plain(model, target_params=0.6, criterion=dict(type='mmgcp.CPSCA'),
                         batches=[Batch(torch.rand(1, 3, 128, 128), [])],
                         input_shape=(3, 128, 128))
    cfg = plain_config(cfg)
    rebuilt = build_detector(make_pruned_config(
        cfg, 'mmyolo.YOLODetector', result.changed_channels))
    assert type(rebuilt) is type(model) is kind
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert not any(key.startswith('sca') for key in model.state_dict())
    assert sum(param.numel() for param in rebuilt.parameters()) == pytest.approx(
        0.6 * before, rel=0.02)
    assert difference(run(rebuilt, 128), run(model, 128)) == 0


def test_pruned_detector_gets_attention_again(model):
    result = pruned(model, threshold=0.6)
    cfg = Config(dict(model=small(), default_scope='mmyolo'))
    cfg = make_pruned_config(plain_config(cfg), 'mmyolo.YOLODetector', result.changed_channels)
    again = Config(dict(cfg.to_dict(), model=with_attention(cfg.model.to_dict())))
    second = build_detector(again)
    second.load_state_dict(model.state_dict(), strict=False)
    vary(second)
    assert len(second.sca) > 30
    table = prune_plain(second, ratio=0.4, criterion=dict(type='mmgcp.CPSCA'),
                        batches=batches(2), input_shape=SHAPE).changed_channels
    rebuilt = build_detector(make_pruned_config(plain_config(again), 'mmyolo.YOLODetector', table))
    rebuilt.load_state_dict(second.state_dict(), strict=True)
    assert sum(p.numel() for p in rebuilt.parameters()) < sum(
        p.numel() for p in model.parameters())


class QuietRunner(Runner):
    """Without asking compilers and the like for their versions, which takes seconds."""

    def _log_env(self, env_cfg):
        pass


def runner(folder, **kwargs):
    return QuietRunner(
        model=ConfigDict(small()),
        work_dir=str(folder),
        train_dataloader=DataLoader([batch(0), batch(1)], collate_fn=itemgetter(0)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2),
        optim_wrapper=dict(
            type='OptimWrapper', constructor='YOLOv5OptimizerConstructor',
            optimizer=dict(type='SGD', lr=0.02, momentum=0.9, nesterov=True)),
        param_scheduler=dict(type='MultiStepLR', milestones=[1]),
        custom_hooks=[
            dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.2, update_buffers=True,
                 priority=49)
        ],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmyolo', log_level='ERROR', randomness=dict(seed=0),
        experiment_name=f'{folder.parent.name}_{folder.name}', **kwargs)


def read(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def training(modules, tmp_path_factory):
    training = runner(tmp_path_factory.mktemp('attention') / 'whole')
    training.train()
    return training


def test_training_moves_the_attention(training):
    """With MMYOLO's optimizer constructor, which looks for parameters by their names."""
    begin = build(small()).sca.state_dict()
    owned = {id(param) for group in training.optim_wrapper.param_groups
             for param in group['params']}
    for name, param in training.model.sca.named_parameters():
        assert id(param) in owned
        assert not torch.equal(param, begin[name]) and param.isfinite().all(), name


def test_average_has_attention_of_its_own(training):
    average = next(hook for hook in training.hooks if isinstance(hook, EMAHook)).ema_model.module
    pairs = list(zip(training.model.sca.parameters(), average.sca.parameters()))
    assert all(param is not own for param, own in pairs)
    assert sum(not torch.equal(param, own) for param, own in pairs) > len(pairs) / 2
    before = run(average)
    with torch.no_grad():
        module = average.sca['backbone-stem']
        module.channel.mean_norm.bias -= 3
        assert difference(run(average), before) > 1e-4
        module.channel.mean_norm.bias += 3


def test_resumed_training_is_the_same_to_the_bit(training, tmp_path):
    resumed = runner(tmp_path / 'resumed', load_from=f'{training.work_dir}/epoch_1.pth',
                     resume=True)
    resumed.train()
    whole, second = (read(f'{item.work_dir}/epoch_2.pth') for item in (training, resumed))
    for part in ('state_dict', 'ema_state_dict'):
        assert list(whole[part]) == list(second[part])
        assert all(torch.equal(value, second[part][key]) for key, value in whole[part].items())
    assert any(key.startswith('sca.') for key in whole['state_dict'])


def test_training_starts_from_a_plain_detector(tmp_path):
    plain = build(yolov4(deepen_factor=0.1), seed=5)
    torch.save(dict(state_dict=plain.state_dict(), meta={}), tmp_path / 'plain.pth')
    training = runner(tmp_path / 'run', load_from=str(tmp_path / 'plain.pth'))
    training.call_hook('before_run')
    training.load_or_resume()
    assert difference(run(plain_of(training.model)), run(plain)) == 0


def test_tool(write_config, tmp_path):
    """From config and checkpoint with attention to those of a plain detector."""
    config = write_config(tmp_path / 'sca.py')
    config.write_text(config.read_text() + ATTENTION_TEXT)
    cfg = load_config(str(config))
    model = vary(randomise(build_detector(cfg)))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES))),
               tmp_path / 'sca.pth')
    out = tmp_path / 'out'
    result = run_here('prune.py', tmp_path / 'sca.py', tmp_path / 'sca.pth', '--criterion', 'CPSCA',
                      '--calib-batches', 1, '--input-size', 96, 96, '--work-dir', out)
    assert result.returncode == 0, result.stderr
    result = load_config(str(out / 'pruned.py'))
    assert result.model.type == 'mmgcp.PrunedDetector'
    assert result.model.detector == 'mmyolo.YOLODetector'
    assert not {'attention', 'detector_type'} & set(result.model)
    plain = build_detector(result)
    assert type(plain) is YOLODetector and not hasattr(plain, 'sca')
    weights = read(out / 'pruned.pth')['state_dict']
    plain.load_state_dict(weights, strict=True)
    assert list(weights) == list(plain_of(model).state_dict())
    assert sum(value.numel() for value in weights.values()) < 0.9 * sum(
        value.numel() for value in plain_of(model).state_dict().values())
