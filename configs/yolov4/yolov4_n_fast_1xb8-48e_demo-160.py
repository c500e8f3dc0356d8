# The small YOLOv4 on the rendered shapes of tools/dataset_converters/make_demo_dataset.py.
_base_ = './yolov4_n_fast_1xb8-60e_voc-320.py'

# ========================Frequently modified parameters======================
data_root = 'work_dirs/demo-data/'
classes = ('cross', 'disc', 'square', 'triangle')
max_epochs = 48
sparse_epochs = 16  # of the later stages, for tools/compress.py
distill_epochs = 20
img_scale = (160, 160)  # width, height
base_lr = 0.03
sparsity_rate = 8e-3

# ========================Possible modified parameters========================
widen_factor = 0.125
affine_scale = 0.2
match_iou_thr = 0.213
# In pixels at the input scale, chosen for the sizes of the rendered shapes
anchors = [
    [(14, 14), (17, 17), (21, 21)],  # P3/8
    [(25, 25), (30, 30), (36, 36)],  # P4/16
    [(43, 43), (51, 51), (61, 61)]  # P5/32
]

# ===============================Unmodified in most cases====================
num_classes = len(classes)
metainfo = dict(classes=classes)
model = dict(
    backbone=dict(widen_factor=widen_factor),
    neck=dict(widen_factor=widen_factor),
    bbox_head=dict(
        head_module=dict(num_classes=num_classes, widen_factor=widen_factor),
        prior_generator=dict(base_sizes=anchors),
        match_iou_thr=match_iou_thr,
        loss_cls=dict(loss_weight=0.25),
        loss_bbox=dict(loss_weight=0.1),
        loss_obj=dict(loss_weight=0.25)))

# Without mosaic, which only pays off in longer schedules
train_pipeline = [
    *_base_.pre_transform,
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - affine_scale, 1 + affine_scale),
        border=(0, 0),
        border_val=(114, 114, 114)),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=True, pad_val=dict(img=114)),
    dict(type='YOLOv5HSVRandomAug'),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'))
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param'))
]
dataset_cfg = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **dataset_cfg))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset_cfg))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=base_lr))
randomness = dict(seed=0)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
train_cfg = dict(max_epochs=max_epochs, val_interval=8)
