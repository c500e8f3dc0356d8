# MMYOLO's YOLOv5-n with its usual batch size and learning rate, and the data, epochs and
# augmentation of the small YOLOv4.
_base_ = '../yolov4/yolov4_n_fast_1xb8-60e_voc-320.py'

train_batch_size_per_gpu = 16
base_lr = 0.01
deepen_factor = 0.33
widen_factor = 0.25
anchors = [
    [(10, 13), (16, 30), (33, 23)],  # P3/8
    [(30, 61), (62, 45), (59, 119)],  # P4/16
    [(116, 90), (156, 198), (373, 326)]  # P5/32
]

strides = _base_.strides
norm_cfg = dict(type='BN', momentum=0.03, eps=0.001)
act_cfg = dict(type='SiLU', inplace=True)
layers_cfg = dict(
    deepen_factor=deepen_factor, widen_factor=widen_factor, norm_cfg=norm_cfg, act_cfg=act_cfg)
model = dict(
    backbone=dict(_delete_=True, type='YOLOv5CSPDarknet', **layers_cfg),
    neck=dict(
        _delete_=True,
        type='YOLOv5PAFPN',
        in_channels=[256, 512, 1024],
        out_channels=[256, 512, 1024],
        num_csp_blocks=3,
        **layers_cfg),
    bbox_head=dict(
        _delete_=True,
        type='YOLOv5Head',
        head_module=dict(
            type='YOLOv5HeadModule',
            num_classes=_base_.num_classes,
            in_channels=[256, 512, 1024],
            widen_factor=widen_factor,
            featmap_strides=strides,
            num_base_priors=3),
        prior_generator=dict(
            type='mmdet.YOLOAnchorGenerator', base_sizes=anchors, strides=strides),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=True,
            reduction='mean',
            loss_weight=_base_.loss_cls_weight * _base_.num_classes / 80),
        loss_bbox=dict(
            type='IoULoss',
            iou_mode='ciou',
            bbox_format='xywh',
            eps=1e-7,
            reduction='mean',
            loss_weight=_base_.loss_bbox_weight,
            return_iou=True),
        loss_obj=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=True,
            reduction='mean',
            loss_weight=_base_.loss_obj_weight * (_base_.img_scale[0] / 640)**2),
        prior_match_thr=4.,
        obj_level_weights=[4., 1., 0.4]))
train_dataloader = dict(batch_size=train_batch_size_per_gpu)
optim_wrapper = dict(
    optimizer=dict(lr=base_lr, batch_size_per_gpu=train_batch_size_per_gpu))
# The layer groups of the base are for YOLOv4
prune_cfg = dict(groups=[
    dict(name='stride-8', modules=['backbone.stem', 'backbone.stage[12]']),
    dict(name='stride-16', modules=['backbone.stage3']),
    dict(name='stride-32', modules=['backbone.stage4', 'neck.reduce_layers']),
    dict(name='top-down', modules=['neck.upsample_layers', 'neck.top_down_layers']),
    dict(name='bottom-up', modules=['neck.downsample_layers', 'neck.bottom_up_layers']),
])
attention_groups = [
    dict(name='backbone', weight=1e4, layers=[f'backbone.stage{stage}' for stage in (1, 2, 3)]),
    dict(name='coarse', weight=1e1, layers=['backbone.stage4', 'neck.bottom_up_layers.1']),
    dict(name='fine', weight=1e2, layers=['neck.top_down_layers.1', 'neck.bottom_up_layers.0']),
]
