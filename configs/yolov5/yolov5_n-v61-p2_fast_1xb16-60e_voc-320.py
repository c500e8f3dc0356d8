# Not trained yet.
# YOLOv5-n with a level of stride 4 for small objects. The other levels are those of YOLOv5-n.
_base_ = './yolov5_n-v61_fast_1xb16-60e_voc-320.py'

strides = [4, 8, 16, 32]
channels = [128, 256, 512, 1024]
anchors = [
    [(5, 6), (8, 14), (15, 11)],  # P2/4
    *_base_.anchors
]
model = dict(
    backbone=dict(out_indices=(1, 2, 3, 4)),
    neck=dict(type='mmgcp.YOLOv5FinerPAFPN', in_channels=channels, out_channels=channels),
    bbox_head=dict(
        head_module=dict(in_channels=channels, featmap_strides=strides),
        prior_generator=dict(base_sizes=anchors, strides=strides),
        obj_level_weights=[4., 1., 0.25, 0.06]))
prune_cfg = dict(groups=[
    *_base_.prune_cfg.groups,
    dict(name='stride-4', modules=['neck.finer']),
])
