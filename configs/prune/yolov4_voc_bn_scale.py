# YOLOv4 on PASCAL VOC, pruned by the scale factors of its BatchNorms:
#   python tools/prune.py configs/prune/yolov4_voc_bn_scale.py CHECKPOINT
# CHECKPOINT should come from configs/yolov4/yolov4_fast_1xb64-50e_voc_sparse.py.
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

prune_cfg = dict(
    criterion=dict(_delete_=True, type='mmgcp.BNScale', without_norm='weight_norm'))
