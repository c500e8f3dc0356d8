# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn as nn
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.runner.checkpoint import load_state_dict
from older_stacks import needs_cpu_autocast
from small_models import GROUPS, build
from torch.nn.modules.batchnorm import _BatchNorm
from yolov4_samples import batch, yolov4

from mmgcp.distillation import SpatialAttentionDistiller, spatial_attention
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


def losses_of(model, data=None):
    return model(**model.data_preprocessor(data or batch(), True), mode='loss')


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(state, other):
    assert list(state) == list(other)
    for key in state:
        assert torch.equal(state[key], other[key]), key


# ------------------------------- the losses -------------------------------


def test_losses_are_those_of_the_student_and_of_the_attention(distiller):
    student, teacher = copy.deepcopy(distiller.student), copy.deepcopy(distiller.teacher)
    losses = losses_of(distiller)
    plain = losses_of(student)
    assert set(losses) == set(plain) | {'loss_attention_backbone', 'loss_attention_head'}
    assert all(torch.equal(losses[name], plain[name]) for name in plain)

    inputs = student.data_preprocessor(batch(), True)['inputs']
    x, y = student.backbone.stem(inputs), teacher.backbone.stem(inputs)
    differences = []
    for stage in range(1, 5):
        x = getattr(student.backbone, f'stage{stage}')(x)
        y = getattr(teacher.backbone, f'stage{stage}')(y)
        differences.append((spatial_attention(x) - spatial_attention(y)).square().mean())
    expected = 1e3 * (differences[0] + differences[3])
    torch.testing.assert_close(losses['loss_attention_backbone'], expected)


def test_weights_of_groups(distiller_config):
    losses = losses_of(build(distiller_config))
    distiller_config['groups'][1]['weight'] *= 100
    heavier = losses_of(build(distiller_config))
    torch.testing.assert_close(
        heavier['loss_attention_head'], 100 * losses['loss_attention_head'])
    assert torch.equal(heavier['loss_attention_backbone'], losses['loss_attention_backbone'])


def test_attention_loss_is_zero_if_the_student_is_the_teacher(distiller_config, teacher_files):
    distiller_config['student'] = yolov4(widen_factor=0.25)
    distiller = build(distiller_config)
    distiller.load_state_dict(distiller.teacher.state_dict())
    for module in distiller.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    losses = losses_of(distiller)
    assert losses['loss_attention_backbone'] == losses['loss_attention_head'] == 0
    distiller.train()  # batch statistics
    assert losses_of(distiller)['loss_attention_backbone'] > 0


def test_layers_of_different_names(distiller_config):
    distiller_config['groups'] = [
        dict(name='one', weight=1., layers=[('backbone.stage1', 'backbone.stage1.1.final_conv')]),
        dict(name='two', weight=1., layers=['backbone.stage1'])
    ]
    losses = losses_of(build(distiller_config))
    assert torch.equal(losses['loss_attention_one'], losses['loss_attention_two'])


def test_gradients_reach_the_student_only(distiller):
    losses = losses_of(distiller)
    (losses['loss_attention_backbone'] + losses['loss_attention_head']).backward()
    assert distiller.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert distiller.bbox_head.head_module.convs_bridge[0].conv.weight.grad.abs().sum() > 0
    assert distiller.bbox_head.head_module.convs_pred[0].weight.grad is None
    assert all(param.grad is None for param in distiller.teacher.parameters())


@needs_cpu_autocast
def test_autocast(distiller):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = losses_of(distiller)
    assert losses['loss_attention_backbone'].dtype == torch.float32
    torch.testing.assert_close(losses['loss_attention_backbone'],
                               losses_of(distiller)['loss_attention_backbone'],
                               rtol=0.1, atol=0)


def test_overfitting_a_batch_lowers_the_attention_loss(distiller):
    optim_wrapper = OptimWrapper(torch.optim.Adam(distiller.parameters(), lr=1e-3))
    teacher = snapshot(distiller.teacher)
    logs = [distiller.train_step(batch(), optim_wrapper) for _ in range(6)]
    totals = [log['loss_attention_backbone'] + log['loss_attention_head'] for log in logs]
    assert totals[-1] < totals[0]
    assert_same_state(distiller.teacher.state_dict(), teacher)


def test_features_are_released(distiller):
    recorded = []
    handles = [model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: recorded.append(weakref.ref(output)))
        for model in (distiller.student, distiller.teacher)
        for group in GROUPS for layer in group['layers']]
    optim_wrapper = OptimWrapper(torch.optim.SGD(distiller.parameters(), lr=1e-3))
    distiller.train_step(batch(), optim_wrapper)
    gc.collect()
    assert len(recorded) == 6 and all(ref() is None for ref in recorded)
    for handle in handles:
        handle.remove()
    for model in (distiller, distiller.teacher):
        assert not any(module._forward_hooks for module in model.modules())


def test_features_of_replaced_modules(distiller):
    losses = losses_of(copy.deepcopy(distiller))
    nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    revert_sync_batchnorm(distiller)
    stage = distiller.backbone.stage1
    distiller.backbone.stage1 = nn.Sequential(stage)
    again = losses_of(distiller)
    assert set(again) == set(losses)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)


# ----------------------- like the student elsewhere -----------------------


def test_predict_and_tensor_are_the_students(distiller):
    distiller.eval()
    data = distiller.data_preprocessor(
        dict(inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)]), False)
    outputs, expected = distiller(**data), distiller.student(**data)
    assert all(torch.equal(a, b) for level, other in zip(outputs, expected)
               for a, b in zip(level, other))


def test_val_step(distiller):
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1., 1.)))
    data = dict(inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)], data_samples=[sample])
    results = distiller.eval().val_step(copy.deepcopy(data))
    expected = distiller.student.val_step(data)
    assert torch.equal(results[0].pred_instances.scores, expected[0].pred_instances.scores)


def test_names_are_the_students(distiller):
    student = build(yolov4())
    assert list(distiller.state_dict()) == list(student.state_dict())
    for method in ('named_parameters', 'named_buffers', 'named_modules'):
        names = [name for name, _ in getattr(distiller, method)()]
        assert names == [name for name, _ in getattr(student, method)()]
    assert isinstance(distiller, BaseModel) and isinstance(distiller.student, type(student))


def test_state_dict_goes_to_and_from_a_plain_student(distiller):
    student = build(yolov4(), seed=7)
    distiller.load_state_dict(student.state_dict(), strict=True)
    assert_same_state(distiller.student.state_dict(), student.state_dict())
    other = build(yolov4(), seed=8).state_dict()
    load_state_dict(distiller, other, strict=True)  # mmengine's
    assert_same_state(distiller.state_dict(), other)
    nested = nn.ModuleDict(dict(module=distiller))
    load_state_dict(nested, {f'module.{key}': value for key, value in
                             student.state_dict().items()}, strict=True)
    assert_same_state(distiller.state_dict(), student.state_dict())
    with pytest.raises(RuntimeError, match='backbone.stem.conv.weight'):
        other.pop('backbone.stem.conv.weight')
        distiller.load_state_dict(other, strict=True)


def test_parameters_of_the_student_itself(distiller_config):

    @MODELS.register_module(force=True)
    class ScaledDetector(MODELS.get('mmyolo.YOLODetector')):

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer('seen', torch.zeros(1))

        def loss(self, *args):
            return dict(loss=super().loss(*args)['loss_obj'] * self.scale)

    distiller_config['student']['type'] = 'mmgcp.ScaledDetector'
    distiller = build(distiller_config)
    assert list(distiller.state_dict())[:2] == ['scale', 'seen']
    assert distiller.scale is distiller.student.scale
    state = distiller.state_dict()
    state['seen'] = state['seen'] + 5
    distiller.load_state_dict(state)
    assert distiller.student.seen == 5
    distiller.double()
    assert distiller.student.scale.dtype == torch.double


def test_attributes_fall_back_to_the_student(distiller):
    assert distiller.with_neck
    assert distiller.test_cfg is distiller.student.test_cfg
    assert distiller.bbox_head is distiller.student.bbox_head
    assert distiller.extract_feat.__self__ is distiller.student
    with pytest.raises(AttributeError, match="'YOLODetector' object has no attribute 'mask_he'"):
        _ = distiller.mask_he
    assert not hasattr(distiller, 'roi_head')


def test_replaced_modules_are_replaced_in_the_student(distiller):
    distiller.neck = nn.Identity()
    assert isinstance(distiller.student.neck, nn.Identity)
    distiller.student.backbone = nn.ReLU()
    assert isinstance(distiller.backbone, nn.ReLU)


def test_synchronised_normalisation_is_replaced_in_the_student(distiller):
    nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    assert isinstance(distiller.student.backbone.stem.bn, nn.SyncBatchNorm)
    revert_sync_batchnorm(distiller)
    assert not isinstance(distiller.student.backbone.stem.bn, nn.SyncBatchNorm)


def test_modes(distiller):
    for mode in (False, True):
        assert distiller.train(mode) is distiller
        assert distiller.training is distiller.student.training is mode
        assert all(module.training is mode for module in distiller.modules())
        assert not any(module.training for module in distiller.teacher.modules())


def test_student_is_initialised_and_not_the_teacher(distiller_config):
    distiller = MODELS.build(distiller_config)
    teacher, student = snapshot(distiller.teacher), snapshot(distiller)
    distiller.init_weights()
    assert_same_state(distiller.teacher.state_dict(), teacher)
    weight = 'bbox_head.head_module.convs_pred.0.bias'
    assert not torch.equal(distiller.state_dict()[weight], student[weight])


# -------------------------------- copies ---------------------------------


def test_copies_share_the_teacher_and_nothing_else(distiller):
    copied, before = copy.deepcopy(distiller), snapshot(distiller)
    assert copied.teacher is distiller.teacher
    assert copied.student is not distiller.student
    assert copied.student.backbone is copied.backbone is not distiller.backbone
    copied.neck = nn.Identity()
    assert isinstance(copied.student.neck, nn.Identity)
    copied.neck = copy.deepcopy(distiller.neck)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in distiller.parameters()}
    expected = losses_of(copy.deepcopy(distiller))
    assert all(torch.equal(value, expected[name]) for name, value in losses_of(copied).items())
    assert_same_state(distiller.state_dict(), before)


def test_teacher_belongs_to_nobody(distiller):
    teacher = {id(param) for param in distiller.teacher.parameters()}
    assert not teacher & {id(param) for param in distiller.parameters()}
    assert not any(module is distiller.teacher for module in distiller.modules())


@pytest.mark.parametrize('update_buffers', [True, False])
def test_averaged_model(distiller, update_buffers):
    average = MMENGINE_MODELS.build(dict(
        type='mmyolo.ExpMomentumEMA', model=distiller, update_buffers=update_buffers))
    assert average.module.teacher is distiller.teacher
    assert len(list(average.parameters())) == len(list(distiller.student.parameters()))
    optim_wrapper = OptimWrapper(torch.optim.SGD(distiller.parameters(), lr=0.1))
    before = snapshot(distiller)
    for _ in range(2):
        distiller.train_step(batch(), optim_wrapper)
        average.update_parameters(distiller)
    key = 'backbone.stem.conv.weight'
    averaged = average.module.student.state_dict()[key]
    assert not torch.equal(averaged, before[key])
    assert averaged.data_ptr() == average.module.state_dict()[key].data_ptr()


def test_pickle_keeps_one_set_of_modules(distiller):
    loaded = pickle.loads(pickle.dumps(distiller))
    assert_same_state(loaded.state_dict(), distiller.state_dict())
    loaded.neck = nn.Identity()
    assert isinstance(loaded.student.neck, nn.Identity)


# -------------------------------- errors ---------------------------------


@pytest.mark.parametrize('groups, message', [
    ([], 'groups must not be empty'),
    ([dict(name='a', weight=1.)], "must have the keys 'name', 'weight' and 'layers'"),
    ([dict(name='a', weight=1., layers=[])], "layers of the group 'a' must be a list"),
    ([dict(name='a', weight=1., layers='neck')], "layers of the group 'a' must be a list"),
    ([dict(name='a', weight=1., layers=[('a', 'b', 'c')])], 'a name or a pair of names'),
    (GROUPS[:1] * 2, 'names of the groups must differ'),
    ([dict(name='a', weight=1., layers=['backbone.stage9'])],
     "the student has no module 'backbone.stage9'; the closest names are 'backbone.stage"),
    ([dict(name='a', weight=1., layers=[('backbone.stage1', 'backbone.stag1')])],
     "the teacher has no module 'backbone.stag1'; the closest names are 'backbone.stage1'"),
])
def test_wrong_groups(distiller_config, groups, message):
    distiller_config['groups'] = groups
    with pytest.raises(UserError, match=message):
        MODELS.build(distiller_config)


def test_incomplete_teacher(distiller_config):
    distiller_config['teacher'].pop('checkpoint')
    with pytest.raises(UserError, match=r"but has \['config'\]"):
        MODELS.build(distiller_config)


def test_missing_checkpoint(distiller_config):
    distiller_config['teacher']['checkpoint'] = 'a.pth'
    with pytest.raises(UserError, match='there is no checkpoint a.pth'):
        MODELS.build(distiller_config)


def test_student_that_is_no_detector(distiller_config):
    distiller_config['student'] = yolov4()['backbone']
    with pytest.raises(UserError, match='must be a detector, but is a YOLOv4CSPDarknet'):
        MODELS.build(distiller_config)


def test_is_registered():
    assert MODELS.get('mmgcp.SpatialAttentionDistiller') is SpatialAttentionDistiller
