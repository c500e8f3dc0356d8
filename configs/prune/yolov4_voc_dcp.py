# YOLOv4 on PASCAL VOC, pruned layer by layer: discrimination-aware pruning (DCP, arXiv 1810.11809):
#   python tools/prune.py configs/prune/yolov4_voc_dcp.py CHECKPOINT --calib-batches 16
# More batches make it better and slower.
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(criterion=dict(_delete_=True, type='mmgcp.DCP', epochs=5, lr_steps=(3, )))
