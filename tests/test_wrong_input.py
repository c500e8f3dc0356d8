# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A table of wrong input: each ends in one sentence that names the value, and changes nothing."""
import inspect
import math

import pytest
import torch

from mmgcp.attention import CPSCA  # noqa: F401  registers it
from mmgcp.errors import UserError
from mmgcp.pipeline.recovery import check_settings
from mmgcp.pruning import LayerGroup, check_request, prune
from mmgcp.registry import DATASETS, HOOKS, MODELS, TASK_UTILS

NAN, INF, HUGE = math.nan, math.inf, 10**400
HOOK, DISTILLER = 'mmgcp.DynamicSparsityHook', 'mmgcp.SpatialAttentionDistiller'
STUDENT = dict(student=dict(type='YOLODetector'), teacher=dict(config='a.py', checkpoint='b.pth'))
GROUP = dict(name='a', modules=['backbone'])
LAYERS = dict(name='a', weight=1., layers=['backbone'])
PRUNER, SPATIAL = 'mmgcp.SpatialPruner', dict(detector_type='YOLODetector')

# Type, arguments, and words of the sentence
SETTINGS = [
    (HOOK, dict(rate=value), ('rate', shown)) for value, shown in (
        ('x', "'x'"), (None, 'None'), ([1], '[1]'), (NAN, 'nan'), (INF, 'inf'), (-1, '-1'),
        (True, 'True'), (1e30, '1e+30'), (HUGE, 'rate must be'), (b'1', "b'1'"))
] + [
    (HOOK, dict(rtae=1), ("unknown option 'rtae'", "did you mean 'rate'?")),
    (HOOK, dict(near_zero_thr=NAN), ('near_zero_thr', 'nan')),
    (HOOK, dict(near_zero_thr='0.1'), ('near_zero_thr', "'0.1'")),
    (HOOK, dict(log_interval=0), ('log_interval', 'is 0')),
    (HOOK, dict(log_interval=1.5), ('log_interval', '1.5')),
    (HOOK, dict(histogram_interval=-1), ('histogram_interval', '-1')),
    (HOOK, dict(penalty='l3'), ('penalty', "'l3'", 'proximal')),
    (HOOK, dict(weight_decay=None), ('weight_decay', 'None')),
    (HOOK, dict(coupled='yes'), ('coupled', "'yes'")),
    (HOOK, dict(schedule='cosine'), ('schedule', "'cosine'")),
    (HOOK, dict(schedule=dict(type='cosin')), ("'cosin'", 'mmgcp.cosine')),
    (HOOK, dict(schedule=dict(type='BNScale')), ("'BNScale'", 'mmgcp.cosine')),
    (HOOK, dict(schedule=dict(begin=1)), ('schedule', 'type')),
    (HOOK, dict(schedule=dict(type='cosine', bgein=1)), ("'bgein'", "'begin'")),
    (HOOK, dict(modules='backbone.*'), ('modules', "'backbone.*'")),
    (HOOK, dict(modules=[]), ('modules', '[]')),
    (HOOK, dict(exclude=[3]), ('exclude', '[3]')),
    (HOOK, dict(groups=3), ('groups', 'is 3')),
    (HOOK, dict(groups=[dict(GROUP, rate_factor='2')]), ('rate_factor', "'2'")),
    (HOOK, dict(groups=[dict(GROUP, rate_factor=INF)]), ('rate_factor', 'inf')),
    (HOOK, dict(groups=[dict(GROUP, name=3)]), ('name of a group', 'is 3')),
    (HOOK, dict(groups=[GROUP, GROUP]), ('must differ', "'a'")),
    (HOOK, dict(input_shape=(3, 0, 640)), ('input_shape', '(3, 0, 640)')),
    (HOOK, dict(input_shape=640), ('input_shape', '640')),
    (HOOK, dict(input_shape=(3, 10**6, 640)), ('input_shape', '1000000')),
    ('mmgcp.DistillAdapterHook', dict(every=1), ("'every'", )),
    ('mmgcp.two_phase', dict(begin=2), ('begin', 'is 2')),
    ('mmgcp.two_phase', dict(percentile='x'), ('percentile', "'x'")),
    ('mmgcp.two_phase', dict(kept_factor=NAN), ('kept_factor', 'nan')),
    ('mmgcp.linear', dict(start=INF), ('start', 'inf')),
    ('mmgcp.linear', dict(begin=0.5, end=0.5), ('begin', '0.5')),
    ('mmgcp.cosine', dict(stop=-1), ('stop', '-1')),
    ('mmgcp.step', dict(milestones=0.5), ('milestones', '0.5')),
    ('mmgcp.step', dict(milestones=[0.5, 'x']), ('milestones', "'x'")),
    ('mmgcp.step', dict(milestones=[0.5, 0.25]), ('milestones', '0.25')),
    ('mmgcp.step', dict(factor=None), ('factor', 'None')),
    ('mmgcp.constant', dict(rate=1), ("'rate'", )),
    ('mmgcp.feedback', {}, ('needs', 'target')),
    ('mmgcp.feedback', dict(target=1.5), ('target', '1.5')),
    ('mmgcp.feedback', dict(target=0.5, min_factor=0), ('min_factor', 'is 0')),
    ('mmgcp.feedback', dict(target=0.5, max_factor=INF), ('max_factor', 'inf')),
    ('mmgcp.feedback', dict(target=0.5, strength='50'), ('strength', "'50'")),
    ('mmgcp.BestOf', dict(criteria='OBS'), ('criteria', "'OBS'")),
    ('mmgcp.BestOf', dict(criteria=[]), ('criteria', 'is []')),
    ('mmgcp.BNScale', dict(without_norm='drop'), ('without_norm', "'drop'")),
    ('mmgcp.BNScale', dict(without=1), ("'without'", "'without_norm'")),
    ('mmgcp.L1Norm', dict(normalize=['mean']), ('normalize', "['mean']")),
    ('mmgcp.L2Norm', dict(fold_norm=1), ('fold_norm', 'is 1')),
    ('mmgcp.FPGM', dict(fold_norm='no'), ('fold_norm', "'no'")),
    ('mmgcp.Random', dict(seed=-1), ('seed', '-1')),
    ('mmgcp.Random', dict(seed=HUGE), ('seed', )),
    ('mmgcp.APoZ', dict(zero='zero'), ('zero', "'zero'")),
    ('mmgcp.APoZ', dict(zero_thr=NAN), ('zero_thr', 'nan')),
    ('mmgcp.Taylor', dict(order=2), ("'order'", )),
    ('mmgcp.GroupFisher', dict(normalize='macs'), ('normalize', "'macs'")),
    ('mmgcp.OBS', dict(ridge=0), ('ridge', 'is 0')),
    ('mmgcp.OBS', dict(ridge='0.01'), ('ridge', "'0.01'")),
    ('mmgcp.OBS', dict(ridge=INF), ('ridge', 'inf')),
    ('mmgcp.CPSCA', dict(fold_scales=None), ('fold_scales', 'None')),
    ('mmgcp.ThiNet', dict(positions=0), ('positions', 'is 0')),
    ('mmgcp.ThiNet', dict(positions=1e3), ('positions', '1000.0')),
    ('mmgcp.ThiNet', dict(seed=None), ('seed', 'None')),
    ('mmgcp.ThiNet', dict(allocation_criterion='BNScale'), ('allocation_criterion', "'BNScale'")),
    ('mmgcp.LCP', dict(alpha=-1), ('alpha', '-1')),
    ('mmgcp.LCP', dict(alhpa=1), ("'alhpa'", "'alpha'")),
    ('mmgcp.LCP', dict(rounds=0), ('rounds', 'is 0')),
    ('mmgcp.LCP', dict(lr=NAN), ('lr', 'nan')),
    ('mmgcp.LCP', dict(lr_steps=5), ('lr_steps', 'is 5')),
    ('mmgcp.LCP', dict(momentum=1), ('momentum', 'is 1')),
    ('mmgcp.LCP', dict(box_weight='50'), ('box_weight', "'50'")),
    ('mmgcp.LCP', dict(roi_size=0), ('roi_size', 'is 0')),
    ('mmgcp.LCP', dict(width=10**9), ('width', '1000000000')),
    ('mmgcp.LCP', dict(iou_threshold=2), ('iou_threshold', 'is 2')),
    ('mmgcp.LCP', dict(point_scales=[0]), ('point_scales', '[0]')),
    ('mmgcp.DCP', dict(epochs=1.5), ('epochs', '1.5')),
    ('mmgcp.DCP', dict(cache_mib=-1), ('cache_mib', '-1')),
    ('mmgcp.DCP', dict(joint_lr=None), ('joint_lr', 'None')),
    ('mmgcp.SpatialAttentionLoss', dict(loss_weight=-1), ('loss_weight', '-1')),
    ('mmgcp.SpatialAttentionLoss', dict(loss_weight=1e30), ('loss_weight', '1e+30')),
    ('mmgcp.FeatureMimicLoss', dict(loss_weight='x'), ('loss_weight', "'x'")),
    ('mmgcp.PearsonLoss', dict(loss_weight=NAN), ('loss_weight', 'nan')),
    ('mmgcp.ChannelWiseLoss', dict(tau=0), ('tau', 'is 0')),
    ('mmgcp.ChannelWiseLoss', dict(tua=1), ("'tua'", "'tau'")),
    ('mmgcp.ResponseLoss', dict(temperature=None), ('temperature', 'None')),
    ('mmgcp.ResponseLoss', dict(weights=dict(cls='1')), ("'cls'", "'1'")),
    ('mmgcp.ResponseLoss', dict(weights=dict(cls=NAN)), ("'cls'", 'nan')),
    ('mmgcp.ResponseLoss', dict(weights=dict(clss=1)), ("'clss'", )),
    ('mmgcp.ResponseLoss', dict(weights=3), ('weights', 'is 3')),
    ('mmgcp.ResponseLoss', dict(box_loss='diou'), ('box_loss', "'diou'")),
    ('mmgcp.ResponseLoss', dict(score_thr=1.5), ('score_thr', '1.5')),
    ('mmgcp.SoftLabelLoss', dict(weights=dict(boxes=1)), ("'boxes'", )),
    ('mmgcp.SoftLabelLoss', dict(weights=dict(cls=-1)), ("'cls'", '-1')),
    ('mmgcp.LocalizationLoss', dict(temperature=-1), ('temperature', '-1')),
    ('mmgcp.LocalizationLoss', dict(valuable_ratio='x'), ('valuable_ratio', "'x'")),
    ('mmgcp.CrossHeadLoss', dict(beta=0.5), ('beta', '0.5')),
    ('mmgcp.CrossHeadLoss', dict(layers='bbox_head.a'), ('layers', "'bbox_head.a'")),
    ('mmgcp.CrossHeadLoss', dict(layers=[None]), ('layers', '[None]')),
    (DISTILLER, dict(STUDENT, student=3), ('student', 'is 3')),
    (DISTILLER, dict(STUDENT, student=dict(type='YOLODetectro')), ('student', 'YOLODetectro')),
    (DISTILLER, dict(STUDENT, teacher='a.pth'), ('teacher', "'a.pth'")),
    (DISTILLER, dict(STUDENT, teacher=dict(config='a.py')), ('teacher', 'checkpoint')),
    (DISTILLER, dict(STUDENT, groups=3), ('groups', 'is 3')),
    (DISTILLER, dict(STUDENT, groups=[None]), ('groups', 'None')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, weight=-1)]), ('weight', '-1')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, weight=NAN)]), ('weight', 'nan')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, weight='x')]), ('weight', "'x'")),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, weight=1e30)]), ('weight', '1e+30')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, layers=3)]), ('layers', 'are 3')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, layers=[3])]), ('layer', 'is 3')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, name=None)]), ('name', 'None')),
    (DISTILLER, dict(STUDENT, groups=[dict(LAYERS, loss='x')]), ('loss', "'x'")),
    (DISTILLER, dict(STUDENT, loss=dict(type='ReLU')), ('ReLU', 'loss between two features')),
    (DISTILLER, dict(STUDENT, loss=dict(type='mmgcp.ResponseLoss')), ('ResponseLoss', )),
    (DISTILLER, dict(STUDENT, loss=dict(tau=1)), ('loss', 'type')),
    (DISTILLER, dict(STUDENT, response='x'), ('response', "'x'")),
    (DISTILLER, dict(STUDENT, response=dict(type='mmgcp.PearsonLoss')), ('PearsonLoss', )),
    (DISTILLER, dict(STUDENT, schedule=dict(warmpu=1)), ("'warmpu'", "'warmup'")),
    (DISTILLER, dict(STUDENT, schedule=dict(warmup='1')), ('warmup', "'1'")),
    (DISTILLER, dict(STUDENT, schedule=dict(stop_epoch=0.5)), ('stop_epoch', '0.5')),
    (DISTILLER, dict(STUDENT, schedule=[1]), ('schedule', '[1]')),
    (DISTILLER, dict(STUDENT, scheduel={}), ("'scheduel'", "'schedule'")),
    ('mmgcp.SCADetector', dict(detector_type='YOLODetector', attention=dict(num_groups=10**6)),
     ('num_groups', '1000000')),
    ('mmgcp.SCADetector', dict(detector_type='YOLODetector', attention=dict(initial_scale=1)),
     ('initial_scale', 'is 1')),
    ('mmgcp.SCADetector', dict(detector_type='YOLODetector', attention=dict(groups=1)),
     ("'groups'", "'num_groups'")),
    ('mmgcp.SCADetector', dict(detector_type='YOLODetector', attention=3), ('attention', 'is 3')),
    ('mmgcp.SCADetector', dict(detector_type='YOLODetectro'), ('YOLODetectro', )),
    (PRUNER, dict(SPATIAL, spatial_cfg=3), ('spatial_cfg', 'is 3')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(tua=0.3)), ("'tua'", "'tau'")),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(tau='0.3')), ('tau', "'0.3'")),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(tau=NAN)), ('tau', 'nan')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(levels=4)), ('levels', 'is 4')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(levels=[])), ('levels', '[]')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(tile=15)), ('tile', 'is 15')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(window=6)), ('window', 'is 6')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(box_cells=0)), ('box_cells', 'is 0')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(loss_weight=-1)), ('loss_weight', '-1')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(gamma=INF)), ('gamma', 'inf')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(alpha=2)), ('alpha', 'is 2')),
    (PRUNER, dict(SPATIAL, spatial_cfg=dict(dense_above=None)), ('dense_above', 'None')),
    (PRUNER, dict(detector_type='YOLODetectro'), ('YOLODetectro', )),
    ('mmgcp.PrunedDetector', dict(detector=3, channels={}), ('detector', 'is 3')),
    ('mmgcp.PrunedDetector', dict(detector='YOLODetector', channels=3), ('channels', 'is 3')),
    ('mmgcp.PrunedDetector', dict(detector='YOLODetector', channels=None), ('channels', 'None')),
    ('mmgcp.YOLOv4CSPDarknet', dict(widen_factor='x'), ('widen_factor', "'x'")),
    ('mmgcp.YOLOv4CSPDarknet', dict(deepen_factor=NAN), ('deepen_factor', 'nan')),
    ('mmgcp.YOLOv4CSPDarknet', dict(out_indices=3), ('out_indices', 'is 3')),
    ('mmgcp.YOLOv4PAFPN', dict(in_channels=3, out_channels=[3]), ('in_channels', 'is 3')),
    ('mmgcp.YOLOv4FinerPAFPN', dict(in_channels=3, out_channels=[3]), ('in_channels', 'is 3')),
    ('mmgcp.YOLOv5FinerPAFPN', dict(in_channels=[3], out_channels=[3, 4]), ('three', '[3, 4]')),
    ('mmgcp.YOLOv4HeadModule', dict(num_classes=0, in_channels=[8]), ('num_classes', 'is 0')),
    ('mmgcp.YOLOv4Head', dict(head_module=None), ('head_module', 'None')),
    ('mmgcp.YOLOv4BBoxCoder', dict(scale_x_y=NAN), ('scale_x_y', 'nan')),
    ('mmgcp.YOLOv4BBoxCoder', dict(strides=[0]), ('strides', '[0]')),
]

# Options of prune(), and words of the sentence
OPTIONS = [
    (dict(ratio='0.5'), ('ratio', "'0.5'")), (dict(ratio=NAN), ('ratio', 'nan')),
    (dict(ratio=1), ('ratio', 'is 1')), (dict(ratio=True), ('ratio', 'True')),
    (dict(target_params='half'), ('target_params', "'half'")),
    (dict(target_flops=INF), ('target_flops', 'inf')),
    (dict(ratio=0.5, target_params=0.25), ('ratio=0.5', 'target_params=0.25', 'exclude')),
    (dict(target_latency=0), ('target_latency', 'is 0')),
    (dict(target_latency='10 ms'), ('target_latency', "'10 ms'")),
    (dict(target_latency=INF), ('target_latency', 'inf')),
    (dict(target_latency=10., ratio=0.5), ('ratio=0.5', 'target_latency=10.0', 'exclude')),
    (dict(target_latency=10., target_flops=0.5), ('target_flops=0.5', 'target_latency=10.0')),
    (dict(runtime='tensorrt'), ('runtime', "'tensorrt'", "'onnxruntime'")),
    (dict(latency_table=3), ('latency_table', 'is 3')),
    (dict(steps=10**9), ('steps', '1000000000')), (dict(steps=True), ('steps', 'True')),
    (dict(round_to=8.), ('round_to', '8.0')), (dict(min_keep_ratio=-1), ('min_keep_ratio', '-1')),
    (dict(groups=3), ('groups', 'is 3')), (dict(groups=None), ('groups', 'None')),
    (dict(groups='all'), ('groups', "'all'")), (dict(groups=[3]), ('groups', '[3]')),
    (dict(groups=[]), ('no layer groups', )), (dict(groups=[dict(name='a')]), ("['name']", )),
    (dict(groups=[dict(GROUP, threshold='0.5')]), ('threshold', "'0.5'")),
    (dict(groups=[dict(GROUP, threshold=NAN)]), ('threshold', 'nan')),
    (dict(groups=[dict(GROUP, ratio='0.5')]), ('ratio', "'0.5'")),
    (dict(groups=[dict(GROUP, modules='backbone')]), ('modules', "'backbone'")),
    (dict(groups=[dict(GROUP, name='')]), ('name of a layer group', "''")),
    (dict(criterion='BNScale'), ('criterion', "'BNScale'")),
    (dict(criterion={}), ('criterion', '{}')), (dict(criterion=dict(without_norm=1)), ('type', )),
    (dict(criterion=dict(type='mmgcp.BNScal')), ("'mmgcp.BNScal'", 'mmgcp.BNScale')),
    (dict(criterion=dict(type='mmgcp.cosine')), ("'mmgcp.cosine'", 'no criterion')),
    (dict(criterion=dict(type='nowhere.BNScale')), ("'nowhere.BNScale'", )),
    (dict(criterion=dict(type='mmgcp.OBS', rigde=1)), ("'rigde'", "'ridge'")),
    (dict(criterion=dict(type='mmgcp.ThiNet'), steps=2), ('ThiNet', '2 steps')),
    (dict(allocation='equal'), ('allocation', "'equal'")), (dict(merge='and'), ('merge', "'and'")),
    (dict(plan=3), ('plan', 'is 3')), (dict(plan=[]), ('plan', '[]')),
    (dict(plan='absent.json'), ('absent.json', )),
    (dict(compensate='fold'), ('compensate', "'fold'")), (dict(finetune=3), ('finetune', 'is 3')),
    (dict(recover={}), ('recover', '{}')), (dict(input_shape=(3, 64)), ('input_shape', '(3, 64)')),
    (dict(input_shape=(3, -32, -32)), ('input_shape', '-32')),
    (dict(calibration=3), ('calibration', 'is 3')), (dict(batches='x'), ('batches', "'x'")),
    (dict(evaluate='mAP'), ('evaluate', "'mAP'")), (dict(checkpoint_file=3), ('checkpoint_file', )),
    (dict(dry_run='yes'), ('dry_run', "'yes'")), (dict(progress=None), ('progress', 'None')),
    (dict(raito=0.5), ("'raito'", "'ratio'")),
]

REGISTRIES = (HOOKS, MODELS, TASK_UTILS, DATASETS)


def one_sentence(error):
    text = str(error)
    assert '\n' not in text and 10 < len(text) < 1000, text
    return text


@pytest.mark.parametrize('kind, settings, words', SETTINGS, ids=[
    f'{kind[6:]}-{"-".join(settings) or "nothing"}-{number}'
    for number, (kind, settings, _) in enumerate(SETTINGS)])
def test_settings(kind, settings, words):
    (registry, ) = [registry for registry in REGISTRIES if kind[6:] in registry.module_dict]
    with pytest.raises(UserError) as caught:
        registry.build(dict(type=kind, **settings))
    text = one_sentence(caught.value)
    assert all(word in text for word in words), text


HOSTILE = ['x', '', None, [], [1], {}, dict(type='x'), NAN, INF, -INF, True, -1, 0, HUGE, 1e308,
           '\0', object(), b'x', 3, 0.5, (1, 2, 3), [None], {1: 2}, torch.ones(2)]
REQUIRED = dict(STUDENT, target=0.5, detector='YOLODetector', channels={},
                detector_type='YOLODetector')
PARTS = [(registry, name) for registry in (HOOKS, MODELS, TASK_UTILS)
         for name, kind in sorted(registry.module_dict.items())
         if kind.__module__.startswith('mmgcp.') and name not in (  # which go on to MMYOLO
             'YOLOv4CSPDarknet', 'YOLOv4Head', 'YOLOv4HeadModule', 'YOLOv4FinerPAFPN',
             'YOLOv4PAFPN', 'YOLOv5FinerPAFPN')]


@pytest.mark.parametrize('registry, name', PARTS, ids=[name for _, name in PARTS])
def test_no_value_of_any_setting_ends_in_another_error(registry, name):
    """Whatever the value of whatever setting is: it is taken or refused in one sentence."""
    kind = registry.module_dict[name]
    function = kind.__init__ if isinstance(kind, type) else kind
    parameters = [item for item in inspect.signature(function).parameters.values()
                  if item.kind is item.POSITIONAL_OR_KEYWORD and item.name not in (
                      'self', 'init_cfg', 'args', 'kwargs')]
    needed = {item.name: REQUIRED[item.name] for item in parameters if item.default is item.empty}
    for item in parameters:
        for value in HOSTILE:
            try:
                kind(**dict(needed, **{item.name: value}))
            except UserError as error:
                one_sentence(error)


def test_table_is_complete():
    """Each class of mmgcp that can be named in a config is in the table."""
    classes = {kind for registry in REGISTRIES for kind in registry.module_dict.values()
               if kind.__module__.startswith('mmgcp.')}
    tried = {registry.get(kind) for kind, _, _ in SETTINGS for registry in REGISTRIES}
    assert {kind.__name__ for kind in classes - tried} == {'VOCFormatDataset'}


@pytest.mark.parametrize('options, words', OPTIONS, ids=[
    f'{"-".join(options)}-{number}' for number, (options, _) in enumerate(OPTIONS)])
def test_options_of_pruning(options, words, monkeypatch):
    """They are refused before the model is looked at."""
    monkeypatch.setattr('mmgcp.pruning.api.trace', lambda *args: pytest.fail('traced'))
    with pytest.raises(UserError) as caught:
        prune(None, **options)
    text = one_sentence(caught.value)
    assert all(word in text for word in words), text
    with pytest.raises(UserError):
        check_request(**options)


def test_layer_group():
    with pytest.raises(UserError, match="threshold of layer group 'a' .* is '0.5'"):
        LayerGroup('a', ['backbone'], threshold='0.5')


@pytest.mark.parametrize('settings, words', [
    (dict(minutes='1'), ('minutes', "'1'")), (dict(minutes=NAN), ('minutes', 'nan')),
    (dict(steps=1.5), ('steps', '1.5')), (dict(steps=1, lr=None), ('lr', 'None'))])
def test_settings_of_recovery(settings, words):
    with pytest.raises(UserError) as caught:
        check_settings(**dict(dict(minutes=None, steps=None, lr=1e-5), **settings))
    assert all(word in str(caught.value) for word in words)
