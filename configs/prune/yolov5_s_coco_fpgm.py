# YOLOv5-s on COCO, pruned by the distances between the filters:
#   python tools/prune.py configs/prune/yolov5_s_coco_fpgm.py CHECKPOINT
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

prune_cfg = dict(
    target_flops=0.5,
    criterion=dict(type='mmgcp.FPGM', normalize='mean', fold_norm=False))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
