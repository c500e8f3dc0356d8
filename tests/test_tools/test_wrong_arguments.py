# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A table of wrong command lines: one sentence, the value named, status 1 or 2, nothing written."""
import pytest
import torch
from scripts import run_here
from tiers import slow_except

DATA = 'demo.py'  # with a data set; tiny.py has none
PRUNE, COMPRESS, TRAIN, TEST = 'prune.py', 'compress.py', 'train.py', 'test.py'
EXPORT = 'export.py'
COMPARE = 'analysis_tools/compare.py'
PLOT = 'analysis_tools/plot_sparsity.py'
DEMO = 'dataset_converters/make_demo_dataset.py'
TO_DARKNET = 'model_converters/mmgcp_to_darknet.py'
FROM_DARKNET = 'model_converters/darknet_to_mmgcp.py'


# Tool, arguments behind those that name the config and checkpoint, words of the sentence
ARGUMENTS = [
    (PRUNE, '--input-size 0 0', ('input_shape', '(3, 0, 0)')),
    (PRUNE, '--input-size -32 -32', ('input_shape', '(3, -32, -32)')),
    (PRUNE, '--input-size 1 1', ('(3, 1, 1)', )),
    (PRUNE, '--input-size 33 47', ('(3, 47, 33)', )),
    (PRUNE, '--input-size 1000000 64', ('input_shape', '1000000')),
    (PRUNE, '--input-size 64', ('--input-size', )),
    (PRUNE, '--input-size a b', ('--input-size', "'a'")),
    (PRUNE, '--calib-batches -1', ('--calib-batches', '-1')),
    (PRUNE, '--calib-batches x', ('--calib-batches', "'x'")),
    (PRUNE, '--metric coco/bbox_mAP', ('validation data', 'No such file')),  # of tiny.py
    (PRUNE, '--val-images 4', ('validation data', 'No such file')),
    (PRUNE, '--val-images -1', ('--val-images', 'is -1')),
    (PRUNE, '--val-images x', ('--val-images', "'x'")),
    (PRUNE, '--val-images 0 --sensitivity', ('--val-images', 'is 0', '--sensitivity')),
    (PRUNE, '--val-images 0 --metric mAP', ('--val-images', 'is 0', '--metric')),
    (PRUNE, '--recover-minutes nan', ('minutes of the recovery', 'nan')),
    (PRUNE, '--recover-minutes -1', ('minutes of the recovery', '-1')),
    (PRUNE, '--target-params 0', ('target_params', '0.0')),
    (PRUNE, '--target-params nan', ('target_params', 'nan')),
    (PRUNE, '--target-params 50%', ('--target-params', "'50%'")),
    (PRUNE, '--target-params 1e-9 --round-to 1', ('1e-07% of the parameters', 'at least')),
    (PRUNE, '--target-flops inf', ('target_flops', 'inf')),
    (PRUNE, '--ratio 0.5 --target-params 0.5', ('ratio=0.5', 'target_params=0.5', 'exclude')),
    (PRUNE, '--ratio 1', ('ratio', '1.0')),
    (PRUNE, '--ratio nan', ('ratio', 'nan')),
    (PRUNE, '--target-latency 0', ('target_latency', 'is 0')),
    (PRUNE, '--target-latency 9 --ratio 0.5', ('ratio=0.5', 'target_latency=9.0', 'exclude')),
    (PRUNE, '--target-latency 1e6 --runtime torch', ('target_latency is 1e+06 ms', 'as it is')),
    (PRUNE, '--target-latency 9 --runtime tensorrt', ('--runtime', "'tensorrt'")),
    (PRUNE, '--target-latency 9 --runtime torch --latency-table absent/t.json', ('absent', )),
    (PRUNE, '--target-flops 0.5 --latency-table t.json', ('--latency-table', 'which is not given')),
    (PRUNE, '--target-flops 0.5 --runtime torch', ('--runtime', 'which is not given')),
    (PRUNE, '--target-latency 9 --runtime torch --latency-table .', ('the latency table .', )),
    (PRUNE, '--steps 0', ('steps', 'is 0')),
    (PRUNE, '--steps 1000000', ('steps', '1000000')),
    (PRUNE, '--round-to -8', ('round_to', '-8')),
    (PRUNE, '--min-keep-ratio 2', ('min_keep_ratio', '2.0')),
    (PRUNE, '--criterion BNScal', ('--criterion', "'BNScal'")),
    (PRUNE, '--merge and', ('--merge', "'and'")),
    (PRUNE, '--allocation equal', ('--allocation', "'equal'")),
    (PRUNE, '--compensate none', ('--compensate', "'none'")),
    (PRUNE, '--compensate fold-means --no-compensate', ('exclude each other', )),
    (PRUNE, '--plan absent.json', ('absent.json', )),
    (PRUNE, '--device tpu', ("'tpu'", )),
    (PRUNE, '--device cuda:99', ('cuda:99', )),
    (PRUNE, '--launcher slrum', ('--launcher', "'slrum'")),
    (PRUNE, '--nonsense', ('--nonsense', )),
    (PRUNE, '--cfg-options foo', ('--cfg-options', 'foo')),
    (PRUNE, '--cfg-options =1', ('--cfg-options', '=1')),
    (PRUNE, '--cfg-options a..b=1', ('--cfg-options', 'a..b=1')),
    (PRUNE, '--cfg-options custom_imports.imports.99.x=1', ('custom_imports.imports.99.x=1', )),
    (PRUNE, '--cfg-options prune_cfg=[1,2]', ('prune_cfg', '[1, 2]')),
    (PRUNE, '--cfg-options prune_cfg=3', ('prune_cfg', 'is 3')),
    (PRUNE, '--cfg-options prune_cfg=None', ('prune_cfg', 'None')),
    (PRUNE, '--cfg-options prune_cfg.mrege=or', ("'mrege'", "'merge'")),
    (PRUNE, '--cfg-options prune_cfg.groups=3', ('groups', 'is 3')),
    (PRUNE, '--cfg-options prune_cfg.criterion=x', ('criterion', "'x'")),
    (PRUNE, '--cfg-options prune_cfg.criterion.type=mmgcp.cosine', ("'mmgcp.cosine'", )),
    (PRUNE, '--cfg-options prune_cfg.criterion.without_norm=x', ('without_norm', "'x'")),
    (PRUNE, '--criterion L1Norm --cfg-options prune_cfg.criterion.type=mmgcp.L1Norm '
     'prune_cfg.criterion.fold=1', ("'fold'", "'fold_norm'")),
    (PRUNE, '--cfg-options prune_cfg.finetune=3 --steps 2', ('finetune', 'is 3')),
    (PRUNE, '--cfg-options prune_cfg.finetune.epoch=3 --steps 2', ("'epoch'", "'epochs'")),
    (PRUNE, '--cfg-options prune_cfg.recover=3', ('recover', 'is 3')),
    (PRUNE, '--cfg-options prune_cfg.recover.minutes=x', ('minutes', "'x'")),
    (PRUNE, '--cfg-options model=3', ('model', )),
    (PRUNE, '--cfg-options model.backbone.widen_factor=x', ('widen_factor', "'x'")),
    (PRUNE, '--cfg-options model.bbox_head.head_module.num_classes=-1', ('num_classes', '-1')),
    (PRUNE, '--cfg-options test_dataloader=3', ('test_dataloader', 'is 3')),
    (TEST, '--cfg-options foo', ('--cfg-options', 'foo')),
    (TEST, '', ('test_dataloader', 'No such file')),  # the data of tiny.py
    (TEST, '--cfg-options test_dataloader=3', ('test_dataloader', 'is 3')),
    (TEST, '--launcher x', ('--launcher', "'x'")),
    (TEST, '--nonsense', ('--nonsense', )),
    (TRAIN, '--cfg-options foo', ('--cfg-options', 'foo')),
    (TRAIN, '--cfg-options custom_hooks.99.x=1', ('custom_hooks', '99')),
    (TRAIN, '--cfg-options custom_hooks=3', ('custom_hooks', 'is 3')),
    (TRAIN, '--cfg-options custom_hooks=[x]', ('custom_hooks', "'x'")),
    (TRAIN, '--cfg-options default_hooks=3', ('default_hooks', 'is 3')),
    (TRAIN, '--cfg-options default_hooks.checkpoint.type=CheckpointHok', ("CheckpointHok", )),
    (TRAIN, '--cfg-options optim_wrapper=3', ('optim_wrapper', 'is 3')),
    (TRAIN, '--cfg-options optim_wrapper.optimizer.type=SDG', ('optim_wrapper', 'SDG')),
    (TRAIN, '--cfg-options optim_wrapper.optimizer.lr=x', ('optim_wrapper', )),
    (TRAIN, '--cfg-options train_cfg=3', ('train_cfg', 'is 3')),
    (TRAIN, '--cfg-options train_cfg.max_epochs=x', ('train_cfg', )),
    (TRAIN, '--cfg-options train_dataloader=3', ('train_dataloader', 'is 3')),
    (TRAIN, '--cfg-options train_dataloader.batch_size=x', ('train_dataloader', )),
    (TRAIN, '--cfg-options train_dataloader.batch_size=0', ('train_dataloader', '0')),
    (TRAIN, '--cfg-options train_dataloader.sampler.type=Samplr', ('train_dataloader', 'Samplr')),
    (TRAIN, '--cfg-options train_dataloader.dataset.type=Nowhere', ('Nowhere', )),
    (TRAIN, '--cfg-options train_dataloader.dataset.ann_file=no.txt', ('no.txt', )),
    (TRAIN, '--cfg-options train_dataloader.dataset.pipeline=3', ('train_dataloader', )),
    (TRAIN, '--cfg-options val_evaluator.type=Metrc', ('val_evaluator', 'Metrc')),
    (TRAIN, '--cfg-options param_scheduler=3', ('param_scheduler', )),
    (TRAIN, '--cfg-options model.type=mmgcp.SpatialAttentionDistiller', ('student', )),
    (TRAIN, '--cfg-options model.neck.widen_factor=x', ('widen_factor', "'x'")),
    (TRAIN, '--cfg-options load_from=absent.pth', ('absent.pth', )),
    (TRAIN, '--launcher x', ('--launcher', "'x'")),
    (COMPRESS, '--target-params 2', ('target_params', '2.0')),
    (COMPRESS, '--target-params nan', ('target_params', 'nan')),
    (COMPRESS, '--epochs 0', ('epochs', 'is 0')),
    (COMPRESS, '--epochs 1.5', ('--epochs', "'1.5'")),
    (COMPRESS, '--sparse-epochs -1', ('sparse_epochs', '-1')),
    (COMPRESS, '--lr nan', ('lr', 'nan')),
    (COMPRESS, '--sparse-lr inf', ('sparse_lr', 'inf')),
    (COMPRESS, '--distill-lr 0', ('distill_lr', '0.0')),
    (COMPRESS, '--sparsity-rate nan', ('sparsity_rate', 'nan')),
    (COMPRESS, '--sparsity-rate -1', ('sparsity_rate', '-1')),
    (COMPRESS, '--sparsity-penalty l1', ('--sparsity-penalty', "'l1'")),
    (COMPRESS, "--prune-options '--round-to", ('--prune-options', 'No closing quotation')),
    (COMPRESS, '--prune-options=--round-ot=8', ('--round-ot', )),
    (COMPRESS, '--prune-options=--dry-run', ('--dry-run', )),
    (COMPRESS, '--prune-options=--calib-batches=-1', ('--calib-batches', '-1')),
    (COMPRESS, '--cfg-options foo', ('--cfg-options', 'foo')),
    (COMPRESS, '--cfg-options prune_cfg=3', ('prune_cfg', 'is 3')),
    (COMPRESS, '--cfg-options train_cfg=3', ('train_cfg', 'is 3')),
    (COMPRESS, '--cfg-options train_cfg.max_epochs=x', ('max_epochs', "'x'")),
    (COMPRESS, '--cfg-options sparse_epochs=x', ('sparse_epochs', "'x'")),
    (COMPRESS, '--data absent', ('absent', )),
    (COMPRESS, '--sparsity-schedule foo', ("'foo'", 'two_phase')),
    (COMPRESS, '--target-flops 1e-9', ('prune', 'MACs cannot be reached')),
    (COMPRESS, '--cfg-options prune_cfg.mrege=or', ("'mrege'", "'merge'")),
    (COMPRESS, '--cfg-options sparsity_rate=x', ('rate', "'x'")),
    (COMPRESS, '--cfg-options attention_groups=x', ('groups', "'x'")),
    (COMPRESS, '--prune-options=--plan=absent.json', ('absent.json', )),
    (PLOT, '--near-zero-thr nan', ('--near-zero-thr', 'nan')),
    (PLOT, '--near-zero-thr -1', ('--near-zero-thr', '-1')),
    (PLOT, '--near-zero-thr x', ('--near-zero-thr', "'x'")),
    (PLOT, '--cfg-options foo', ('--cfg-options', 'foo')),
    (PLOT, '--cfg-options model.type=YOLODetectro', ('YOLODetectro', )),
    (EXPORT, '--input-size 0 0', ('input_shape', '(3, 0, 0)')),
    (EXPORT, '--input-size 33 64', ('multiple of 32', '33 x 64')),
    (EXPORT, '--batch 0', ('batch', 'is 0')),
    (EXPORT, '--batch x', ('--batch', "'x'")),
    (EXPORT, '--opset 18', ('opset', '18')),
    (EXPORT, '--tolerance nan', ('tolerance', 'nan')),
    (EXPORT, '--tolerance 2', ('tolerance', '2.0')),
    (EXPORT, '--calib-batches 0', ('calib_batches', 'is 0')),
    (EXPORT, '--val-images -1', ('val_images', '-1')),
    (EXPORT, '--weight-bits 4', ('--weight-bits', '4')),
    (EXPORT, '--format tensorrt', ('--format', "'tensorrt'")),
    (EXPORT, '--format ncnn --nms', ('ncnn has no NMS', )),
    (EXPORT, '--format openvino', ('out.onnx', '.xml')),
    (EXPORT, '--dynamic all', ('--dynamic', "'all'")),
    (EXPORT, '--nms --cfg-options model.test_cfg.nms=3', ('test_cfg.nms', 'is 3')),
    (EXPORT, '--nms --cfg-options model.test_cfg.nms.iou_threshold=x', ('iou_threshold', "'x'")),
    (EXPORT, '--nms --cfg-options model.test_cfg.score_thr=x', ('score_thr', "'x'")),
    (EXPORT, '--nms --cfg-options model.test_cfg.max_per_img=0', ('max_per_img', 'is 0')),
    (EXPORT, '--cfg-options foo', ('--cfg-options', 'foo')),
    (COMPARE, 'more.py', ('3 files', 'more.py')),
    (COMPARE, 'more.py absent.pth', ('there is no checkpoint absent.pth', )),
    (COMPARE, '--names one two', ('--names', '1 different')),
    (COMPARE, '--data nowhere', ('nowhere', 'does not exist')),
    (COMPARE, '--metric mAP', ('validation data', 'No such file')),  # of tiny.py
    (COMPARE, '--val-images -1', ('val_images', 'is -1')),
    (COMPARE, '--val-images x', ('--val-images', "'x'")),
    (COMPARE, '--rounds 0', ('rounds', 'is 0')),
    (COMPARE, '--threads 0', ('threads', 'is 0')),
    (COMPARE, '--threads x', ('--threads', "'x'")),
    (COMPARE, '--weight-bits 4', ('--weight-bits', '4')),
    (COMPARE, '--calib-batches 0', ('calib_batches', 'is 0')),
    (COMPARE, '--cfg-options foo', ('--cfg-options', 'foo')),
    (COMPARE, '--cfg-options model.type=YOLODetectro', ('YOLODetectro', )),
    (COMPARE, '--nonsense', ('--nonsense', )),
    (DEMO, '--num-train 0', ('num_train', 'is 0')),
    (DEMO, '--num-val -1', ('num_val', '-1')),
    (DEMO, '--num-test x', ('--num-test', "'x'")),
    (DEMO, '--size 64', ('size', 'is 64')),
    (DEMO, '--seed -1', ('seed', '-1')),
    (TO_DARKNET, '--input-size 0 0', ('0x0', )),
    (TO_DARKNET, '--input-size 33 47', ('33x47', )),
    (TO_DARKNET, '--input-size -32 -32', ('-32x-32', )),
    (FROM_DARKNET, 'absent.cfg absent.weights out.pth', ('absent.cfg', )),
    (FROM_DARKNET, 'absent.cfg absent.weights out.txt', ('out.txt', '.pth')),
]
FAST = [case for case in ARGUMENTS if case[0] != COMPRESS or 'cfg-options' not in case[1]]


def start_of(tool, files, data_config):
    """The arguments that name what a tool works on."""
    if tool in (PRUNE, TEST, PLOT, COMPARE):
        return list(files)
    if tool == EXPORT:
        return [*files, 'out.onnx']
    if tool == TO_DARKNET:
        return [*files, 'out']
    return {TRAIN: [data_config], COMPRESS: [data_config], DEMO: ['shapes']}.get(tool, [])


@pytest.fixture(scope='module')
def data_config(write_config, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('config') / DATA)


def check(result, folder, words):
    """One sentence, the value named, status 1 or 2, nothing written, no traceback."""
    printed = result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert result.returncode in (1, 2), printed[-2000:]
    assert 'Traceback' not in printed
    assert all(word in lines[-1] for word in words), lines[-1]
    name = result.args[1].split('/')[-1]
    assert lines[-1].startswith(f'{name}: ')
    if result.returncode == 1 and name in (TRAIN, TEST, COMPRESS):
        assert printed.strip() == lines[-1]  # which is alone
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize('case', slow_except(FAST, ARGUMENTS), ids=lambda case: ' '.join(case[:2]))
def test_one_sentence(case, config_files, data_config, tmp_path):
    tool, arguments, words = case
    arguments = ["--prune-options='--round-to"] if arguments.startswith(
        "--prune-options '") else arguments.split()
    if tool == COMPRESS and 'prune_cfg' not in ' '.join(arguments):
        arguments = ['--target-params', 0.5, *arguments]
    result = run_here(tool, *start_of(tool, config_files, data_config), *arguments, cwd=tmp_path)
    check(result, tmp_path, words)


HOOK = 'custom_hooks = [dict(type="mmgcp.DynamicSparsityHook", {})]'
DISTILLER = ('model = dict(_delete_=True, type="mmgcp.SpatialAttentionDistiller", '
             'student={}, teacher=dict(config="no.py", checkpoint="no.pth"), {})')
STUDENT = 'dict(type="YOLODetector")'
# What the config of a training adds to demo.py, and words of the sentence
CONFIGS = [
    (HOOK.format('rate=float("inf")'), ('rate', 'inf')),
    (HOOK.format('rtae=1'), ("'rtae'", "'rate'")),
    (HOOK.format('schedule=dict(type="two_phases")'), ("'two_phases'", 'two_phase')),
    (HOOK.format('modules=["nek.*"]'), ("'nek.*'", )),
    (HOOK.format('groups=[dict(name="a", modules=["neck"], rate_factor="2")]'), ("'2'", )),
    ('custom_hooks = [dict(type="mmgcp.DistillAdapterHook")]', ('SpatialAttentionDistiller', )),
    (DISTILLER.format('dict(type="YOLODetectro")', ''), ('student', 'YOLODetectro')),
    (DISTILLER.format('3', ''), ('student', 'is 3')),
    (DISTILLER.format(STUDENT, 'groups="all"'), ('groups', "'all'")),
    (DISTILLER.format(STUDENT, 'response=dict(type="mmgcp.ResponseLoss", temperature=0)'),
     ('temperature', 'is 0')),
    (DISTILLER.format(STUDENT, 'schedule=dict(warmup=-1)'), ('warmup', '-1')),
    ('load_from = "{{ fileDirname }}/other.pth"', ('none of the weights', 'other.pth')),
]


@pytest.mark.parametrize('text, words', CONFIGS)
def test_config_of_a_training(text, words, data_config, tmp_path):
    config, folder = data_config.parent / 'child.py', tmp_path / 'here'
    config.write_text(f'_base_ = {str(data_config)!r}\n{text}\n')
    torch.save(dict(state_dict={'fc.weight': torch.ones(1)}), data_config.parent / 'other.pth')
    folder.mkdir()
    check(run_here(TRAIN, config, cwd=folder), folder, words)


def test_traceback_on_request(data_config, tmp_path, monkeypatch):
    monkeypatch.setenv('MMGCP_TRACEBACK', '0')
    result = run_here(TRAIN, data_config, '--traceback', '--cfg-options', 'custom_hooks=3',
                      cwd=tmp_path)
    assert result.returncode == 1 and 'Traceback (most recent call last)' in result.stderr
    assert result.stderr.strip().splitlines()[-1] == (
        'train.py: custom_hooks of the config must be a list, but is 3')
