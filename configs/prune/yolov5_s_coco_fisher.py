# YOLOv5-s on COCO, pruned by the gates' Fisher information:
#   python tools/prune.py configs/prune/yolov5_s_coco_fisher.py CHECKPOINT --calib-batches 16
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

prune_cfg = dict(
    target_flops=0.5,
    criterion=dict(type='mmgcp.GroupFisher', normalize='memory'))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
