# A small YOLOv4 for a CPU and one folder in VOC format (JPEGImages, Annotations, ImageSets/Main).
# For another folder, change data_root, classes and the two splits.
_base_ = './yolov4_fast_1xb64-50e_voc.py'

# ========================Frequently modified parameters======================
data_root = 'data/BCCD/'
classes = ('Platelets', 'RBC', 'WBC')
train_split = 'trainval'
val_split = 'test'
max_epochs = 60
sparse_epochs = 30  # of the later stages, for tools/compress.py
distill_epochs = 40
img_scale = (320, 320)  # width, height
train_batch_size_per_gpu = 8
train_num_workers = 2
base_lr = 0.02
# For sparse training: high because the schedule is short. A scale factor of 1 moves by about
# lr / (1 - momentum) * rate per iteration.
sparsity_rate = 7e-3

# ========================Possible modified parameters========================
deepen_factor = 0.33
widen_factor = 0.1875
affine_scale = 0.5
# These give each target more positives than YOLOv4's settings, for short schedules
match_iou_thr = 0.1
scale_x_y = [2.0, 2.0, 2.0]
lr_factor = 0.01
dataset_type = 'mmgcp.VOCFormatDataset'

# ===============================Unmodified in most cases====================
# A narrow network spends its MACs in other layers. Multiples of 16 would leave its first ones whole
prune_cfg = dict(target_flops=None, round_to=1)
num_classes = len(classes)
metainfo = dict(classes=classes)
# The base's anchors are for a scale of 608; they shrink with the image
anchors = [[(width * img_scale[0] / 608, height * img_scale[0] / 608)
            for width, height in level] for level in _base_.anchors]
model = dict(
    backbone=dict(deepen_factor=deepen_factor, widen_factor=widen_factor),
    neck=dict(deepen_factor=deepen_factor, widen_factor=widen_factor),
    bbox_head=dict(
        head_module=dict(num_classes=num_classes, widen_factor=widen_factor),
        prior_generator=dict(base_sizes=anchors),
        bbox_coder=dict(scale_x_y=scale_x_y),
        match_iou_thr=match_iou_thr,
        loss_obj=dict(loss_weight=_base_.loss_obj_weight * (img_scale[0] / 640)**2)))

train_pipeline = [
    *_base_.pre_transform,
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=_base_.pre_transform),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - affine_scale, 1 + affine_scale),
        border=(-img_scale[0] // 2, -img_scale[1] // 2),
        border_val=(114, 114, 114)),
    dict(type='YOLOv5HSVRandomAug'),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'))
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
    batch_size=8,
    num_workers=train_num_workers,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file=f'ImageSets/Main/{val_split}.txt',
        data_prefix=dict(sub_data_root=''),
        pipeline=test_pipeline,
        batch_shapes_cfg=None))
test_dataloader = val_dataloader
val_evaluator = dict(iou_thrs=[percent / 100 for percent in range(50, 100, 5)])
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=base_lr, batch_size_per_gpu=train_batch_size_per_gpu))
default_hooks = dict(
    # MMYOLO's warm-up takes at least 1000 iterations, too many for a small data set
    param_scheduler=dict(
        lr_factor=lr_factor, max_epochs=max_epochs, warmup_epochs=3, warmup_mim_iter=50),
    checkpoint=dict(interval=10, save_best='pascal_voc/mAP'),
    logger=dict(interval=10))
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
