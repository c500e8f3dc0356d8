# YOLOv4 on PASCAL VOC, pruned layer by layer: localization-aware pruning (LCP, arXiv 1911.02237):
#   python tools/prune.py configs/prune/yolov4_voc_lcp.py CHECKPOINT --calib-batches 16
# More batches make it better and slower.
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(criterion=dict(_delete_=True, type='mmgcp.LCP', epochs=5, lr_steps=(3, )))
