# A small SSD300 for a CPU and one folder in VOC format (JPEGImages, Annotations, ImageSets/Main):
# a ResNet-18 of half the width, up to its third stage, trained from scratch. For another folder,
# change data_root, classes and the two splits.
_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
data_root = 'data/BCCD/'
classes = ('Platelets', 'RBC', 'WBC')
train_split = 'trainval'
val_split = 'test'
max_epochs = 80
train_batch_size_per_gpu = 8
train_num_workers = 2
base_lr = 0.01

# ========================Possible modified parameters========================
base_channels = 32  # of the ResNet; an ordinary one has 64
dataset_type = 'mmgcp.VOCFormatDataset'

# ===============================Unmodified in most cases====================
num_classes = len(classes)
metainfo = dict(classes=classes)
norm_cfg = dict(type='BN', requires_grad=True)
backbone_channels = (2 * base_channels, 4 * base_channels)
level_channels = (*backbone_channels, *[2 * base_channels] * 4)
model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=base_channels,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='pytorch',
        zero_init_residual=False),
    neck=dict(
        in_channels=backbone_channels,
        out_channels=level_channels,
        l2_norm_scale=None,
        norm_cfg=norm_cfg),
    bbox_head=dict(in_channels=level_channels, num_classes=num_classes))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    # The encoded size of a box is a logarithm, but some boxes of BCCD have no width or height
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=True),
    dict(
        type='Expand',
        mean=[123.675, 116.28, 103.53],
        to_rgb=True,
        ratio_range=(1, 2)),
    dict(type='MinIoURandomCrop', min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
    dict(type='Resize', scale=(300, 300), keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='PhotoMetricDistortion',
        brightness_delta=32,
        contrast_range=(0.5, 1.5),
        saturation_range=(0.5, 1.5),
        hue_delta=18),
    dict(type='PackDetInputs')
]
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    num_workers=train_num_workers,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file=f'ImageSets/Main/{train_split}.txt',
        data_prefix=dict(sub_data_root=''),
        filter_cfg=dict(filter_empty_gt=False, min_size=32),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=train_num_workers,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file=f'ImageSets/Main/{val_split}.txt',
        data_prefix=dict(sub_data_root='')))
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='VOCMetric',
    metric='mAP',
    eval_mode='area',
    iou_thrs=[percent / 100 for percent in range(50, 100, 5)])
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=base_lr), clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True)
]
default_hooks = dict(
    checkpoint=dict(interval=10, save_best='pascal_voc/mAP'), logger=dict(interval=10))
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
auto_scale_lr = dict(base_batch_size=train_batch_size_per_gpu)
