# Trained for docs/spatial_pruning.md, with fewer epochs and from the weights of YOLOv5-n on COCO.
# The same with dynamic spatial pruning: stride 4 is computed where small objects may be.
# See docs/spatial_pruning.md. On stride 8, YOLOv5's head has a 1x1 convolution only.
_base_ = './yolov5_n-v61-p2_fast_1xb16-60e_voc-320.py'

model = dict(
    type='mmgcp.SpatialPruner',
    detector_type=_base_.model.type,
    spatial_cfg=dict(levels=[4], tau=0.4))
