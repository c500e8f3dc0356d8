# YOLOv4 on PASCAL VOC, pruned by chance:
#   python tools/prune.py configs/prune/yolov4_voc_random.py CHECKPOINT
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(
    criterion=dict(_delete_=True, type='mmgcp.Random', seed=0))
