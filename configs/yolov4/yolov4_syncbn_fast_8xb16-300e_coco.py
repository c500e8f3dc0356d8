# Not trained yet.
# YOLOv4 (https://arxiv.org/abs/2004.10934) trained the way MMYOLO trains YOLOv5.
_base_ = [
    'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
    '../_base_/prune/yolov4_groups.py', '../_base_/distill/yolov4_groups.py'
]

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
num_classes = 80
max_epochs = 300
# In pixels, for the input scale of 608 that they were found for
anchors = [
    [(12, 16), (19, 36), (40, 28)],  # P3/8
    [(36, 75), (76, 55), (72, 146)],  # P4/16
    [(142, 110), (192, 243), (459, 401)]  # P5/32
]

# ========================Possible modified parameters========================
img_scale = (640, 640)  # width, height
deepen_factor = 1.0
widen_factor = 1.0
norm_cfg = dict(type='SyncBN', momentum=0.03, eps=0.001)
affine_scale = 0.5
mixup_prob = 0.1
loss_cls_weight = 0.5
loss_bbox_weight = 0.05
loss_obj_weight = 1.0
match_iou_thr = 0.213  # IoU of the shapes above which an anchor is positive
ignore_iou_thr = 0.7  # IoU above which the objectness of a negative is ignored
# Factor on the weights of GCP-SAD, which make up far more than MMYOLO's detection loss
attention_factor = 1e-4

# ===============================Unmodified in most cases====================
strides = [8, 16, 32]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmgcp.YOLOv4CSPDarknet',
        deepen_factor=deepen_factor,
        widen_factor=widen_factor,
        norm_cfg=norm_cfg,
        act_cfg=dict(type='mmgcp.Mish', inplace=True)),
    neck=dict(
        _delete_=True,
        type='mmgcp.YOLOv4PAFPN',
        deepen_factor=deepen_factor,
        widen_factor=widen_factor,
        in_channels=[256, 512, 1024],
        out_channels=[128, 256, 512],
        norm_cfg=norm_cfg,
        act_cfg=dict(type='LeakyReLU', negative_slope=0.1, inplace=True)),
    bbox_head=dict(
        _delete_=True,
        type='mmgcp.YOLOv4Head',
        head_module=dict(
            type='mmgcp.YOLOv4HeadModule',
            num_classes=num_classes,
            in_channels=[128, 256, 512],
            widen_factor=widen_factor,
            featmap_strides=strides,
            num_base_priors=3,
            norm_cfg=norm_cfg),
        prior_generator=dict(
            type='mmdet.YOLOAnchorGenerator', base_sizes=anchors, strides=strides),
        bbox_coder=dict(
            type='mmgcp.YOLOv4BBoxCoder', scale_x_y=[1.2, 1.1, 1.05], strides=strides),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=True,
            reduction='mean',
            loss_weight=loss_cls_weight),
        loss_bbox=dict(
            type='IoULoss',
            iou_mode='ciou',
            bbox_format='xyxy',
            eps=1e-7,
            reduction='mean',
            loss_weight=loss_bbox_weight,
            return_iou=True),
        loss_obj=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=True,
            reduction='mean',
            loss_weight=loss_obj_weight * (img_scale[0] / 640)**2),
        match_iou_thr=match_iou_thr,
        ignore_iou_thr=ignore_iou_thr,
        obj_level_weights=[4., 1., 0.4]))

pre_transform = _base_.pre_transform
mosaic_affine_transform = [
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=pre_transform),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - affine_scale, 1 + affine_scale),
        # img_scale is (width, height)
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
    # Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
    collate_fn=dict(_delete_=True, type='yolov5_collate'),
    dataset=dict(pipeline=train_pipeline))
default_hooks = dict(param_scheduler=dict(scheduler_type='cosine'))
attention_groups = [
    dict(group, weight=attention_factor * group['weight']) for group in _base_.attention_groups
]
