# YOLOv4 on PASCAL VOC, pruned by the absolute weights of the filters:
#   python tools/prune.py configs/prune/yolov4_voc_l1_norm.py CHECKPOINT
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(
    criterion=dict(_delete_=True, type='mmgcp.L1Norm', normalize='mean', fold_norm=False))
