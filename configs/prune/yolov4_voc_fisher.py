# YOLOv4 on PASCAL VOC, pruned by the gates' Fisher information:
#   python tools/prune.py configs/prune/yolov4_voc_fisher.py CHECKPOINT --calib-batches 16
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(
    criterion=dict(_delete_=True, type='mmgcp.GroupFisher', normalize='memory'))
