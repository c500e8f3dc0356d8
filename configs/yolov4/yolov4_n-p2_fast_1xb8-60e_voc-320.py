# Not trained yet.
# The small YOLOv4 with a level of stride 4 for small objects. The other levels are the same.
_base_ = './yolov4_n_fast_1xb8-60e_voc-320.py'

strides = [4, 8, 16, 32]
in_channels = [128, 256, 512, 1024]
out_channels = [64, 128, 256, 512]
# Half of those of stride 8, which shrink with the image
anchors = [[(width / 2, height / 2) for width, height in _base_.anchors[0]], *_base_.anchors]
model = dict(
    backbone=dict(out_indices=(2, 3, 4, 5)),
    neck=dict(
        type='mmgcp.YOLOv4FinerPAFPN', in_channels=in_channels, out_channels=out_channels),
    bbox_head=dict(
        head_module=dict(in_channels=out_channels, featmap_strides=strides),
        prior_generator=dict(base_sizes=anchors, strides=strides),
        bbox_coder=dict(scale_x_y=[2.0] * 4, strides=strides),
        obj_level_weights=[4., 1., 0.25, 0.06]))
prune_cfg = dict(groups=[
    *_base_.prune_cfg.groups,
    dict(name='stride-4', modules=['neck.finer']),
])
