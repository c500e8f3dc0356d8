# Not trained yet.
# The same with dynamic spatial pruning: the strides 4 and 8 are computed where small objects may
# be. See docs/spatial_pruning.md.
_base_ = './yolov4_n-p2_fast_1xb8-60e_voc-320.py'

model = dict(
    type='mmgcp.SpatialPruner',
    detector_type=_base_.model.type,
    spatial_cfg=dict(levels=[4, 8], tau=0.4))
