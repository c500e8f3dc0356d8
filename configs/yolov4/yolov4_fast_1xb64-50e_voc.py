# Not trained yet.
# YOLOv4 on PASCAL VOC: trained on 07+12 trainval, tested on 07 test.
_base_ = './yolov4_syncbn_fast_8xb16-300e_coco.py'

# ========================Frequently modified parameters======================
data_root = 'data/VOCdevkit/'
num_classes = 20
max_epochs = 50
train_batch_size_per_gpu = 64
base_lr = 0.00334
# The checkpoint to start from: of the COCO model, or of a converted Darknet file such as
# yolov4.conv.137 (tools/model_converters/darknet_to_mmgcp.py)
load_from = None

# ========================Possible modified parameters========================
img_scale = (416, 416)  # width, height
dataset_type = 'YOLOv5VOCDataset'
norm_cfg = dict(type='BN', momentum=0.03, eps=0.001)
affine_scale = 0.5
mixup_prob = 0.05
lr_factor = 0.1
save_checkpoint_intervals = 5

# ===============================Unmodified in most cases====================
# The shares of parameters and MACs that the paper keeps on this data set
prune_cfg = dict(target_params=0.353, target_flops=0.651)

model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(
        head_module=dict(num_classes=num_classes, norm_cfg=norm_cfg),
        loss_obj=dict(loss_weight=_base_.loss_obj_weight * (img_scale[0] / 640)**2)),
    test_cfg=dict(nms=dict(iou_threshold=0.6)))

pre_transform = _base_.pre_transform
mosaic_affine_transform = [
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=pre_transform),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - affine_scale, 1 + affine_scale),
        border=(-img_scale[0] // 2, -img_scale[1] // 2),
        border_val=(114, 114, 114))
]
train_pipeline = [
    *pre_transform, *mosaic_affine_transform,
    dict(
        type='YOLOv5MixUp',
        prob=mixup_prob,
        pre_transform=[*pre_transform, *mosaic_affine_transform]),
    dict(type='YOLOv5HSVRandomAug'),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'))
]
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type=dataset_type,
                data_root=data_root,
                ann_file=f'VOC{year}/ImageSets/Main/trainval.txt',
                data_prefix=dict(sub_data_root=f'VOC{year}/'),
                filter_cfg=dict(filter_empty_gt=False, min_size=32),
                pipeline=train_pipeline) for year in (2007, 2012)
        ],
        # The two years differ only in this key
        ignore_keys='dataset_type'))

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param'))
]
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        ann_file='VOC2007/ImageSets/Main/test.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        test_mode=True,
        pipeline=test_pipeline,
        batch_shapes_cfg=dict(_base_.batch_shapes_cfg, img_size=img_scale[0])))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='mmdet.VOCMetric', metric='mAP', eval_mode='area')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=base_lr, batch_size_per_gpu=train_batch_size_per_gpu))
default_hooks = dict(
    param_scheduler=dict(lr_factor=lr_factor, max_epochs=max_epochs),
    checkpoint=dict(interval=save_checkpoint_intervals))
train_cfg = dict(max_epochs=max_epochs, val_interval=save_checkpoint_intervals)
