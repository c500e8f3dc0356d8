# YOLOv5-s on COCO, pruned by the scale factors of its BatchNorms:
#   python tools/prune.py configs/prune/yolov5_s_coco_bn_scale.py CHECKPOINT
# CHECKPOINT should come from configs/yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_sparse.py.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

prune_cfg = dict(
    target_flops=0.5,
    criterion=dict(type='mmgcp.BNScale', without_norm='weight_norm'))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
