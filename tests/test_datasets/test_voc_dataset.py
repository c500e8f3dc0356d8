# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmdet.evaluation import VOCMetric
from mmdet.utils import register_all_modules as register_mmdet
from mmengine.structures import InstanceData
from mmyolo.registry import DATASETS
from mmyolo.utils import register_all_modules

from mmgcp.datasets import VOCError
from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset

META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    register_mmdet(init_default_scope=False)
    register_all_modules()
    # The name is that of PASCAL VOC, the classes are not
    path = tmp_path_factory.mktemp('VOC2007') / 'shapes'
    make_demo_dataset(path, DemoOptions(num_train=4, num_val=2, num_test=2, size=128))
    return path


def build_dataset(root, split='train', classes=CLASSES, **kwargs):
    return DATASETS.build(
        dict(
            type='mmgcp.VOCFormatDataset',
            data_root=str(root),
            metainfo=dict(classes=classes),
            ann_file=f'ImageSets/Main/{split}.txt',
            **kwargs))


def test_data_list(root):
    dataset = build_dataset(root)
    assert len(dataset) == 4
    assert dataset.metainfo == dict(classes=CLASSES)
    info = dataset.get_data_info(0)
    assert info['img_path'] == str(root / 'JPEGImages' / '000000.jpg')
    assert info['instances']


def test_batch_shapes(root):
    cfg = dict(
        type='BatchShapePolicy', batch_size=2, img_size=128, size_divisor=32, extra_pad_ratio=0.5)
    dataset = build_dataset(root, 'test', test_mode=True, batch_shapes_cfg=cfg)
    assert 'batch_shape' in dataset.get_data_info(0)


def test_classes_are_needed(root):
    with pytest.raises(VOCError, match='needs metainfo'):
        build_dataset(root, classes=())


def test_unknown_class(root):
    with pytest.raises(VOCError, match=r'Class .* in .*\.xml is not one of .* \(disc\)'):
        build_dataset(root, 'trainval', ('disc', ))
    dataset = build_dataset(root, 'trainval', ('disc', ), strict_classes=False)
    labels = [item['bbox_label'] for info in map(dataset.get_data_info, range(len(dataset)))
              for item in info['instances']]
    assert set(labels) <= {0}


def test_missing_annotation(root, tmp_path):
    path = tmp_path / 'set.txt'
    path.write_text('123456\n')
    with pytest.raises(VOCError, match='123456.xml does not exist'):
        DATASETS.build(
            dict(
                type='mmgcp.VOCFormatDataset',
                data_root=str(root),
                metainfo=dict(classes=CLASSES),
                ann_file=str(path)))


@pytest.fixture
def samples(root):
    pipeline = [
        dict(type='LoadImageFromFile', backend_args=None),
        dict(type='YOLOv5KeepRatioResize', scale=(96, 96)),
        dict(type='LetterResize', scale=(96, 96), allow_scale_up=False, pad_val=dict(img=114)),
        dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
        dict(type='mmdet.PackDetInputs', meta_keys=META_KEYS)
    ]
    dataset = build_dataset(root, test_mode=True, pipeline=pipeline)
    return [dataset[index]['data_samples'] for index in range(len(dataset))]


def evaluate(samples, shift):
    metric = VOCMetric(iou_thrs=[percent / 100 for percent in range(50, 100, 5)],
                       eval_mode='area')
    metric.dataset_meta = dict(classes=CLASSES)
    for sample in samples:
        truth = sample.gt_instances
        sample.pred_instances = InstanceData(
            bboxes=torch.as_tensor(truth.bboxes.tensor) + shift,
            labels=truth.labels,
            scores=torch.ones(len(truth)))
        metric.process({}, [sample.to_dict()])
    return metric.evaluate(len(samples))


def test_metric(samples):
    perfect = evaluate(samples, 0.0)
    keys = [f'pascal_voc/AP{percent}' for percent in range(50, 100, 5)]
    assert list(perfect) == ['pascal_voc/mAP', *keys]
    assert all(value == pytest.approx(1.0) for value in perfect.values())
    shifted = evaluate(samples, 2.0)
    assert shifted['pascal_voc/AP50'] > shifted['pascal_voc/AP95']
