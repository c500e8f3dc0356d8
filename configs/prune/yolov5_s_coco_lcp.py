# YOLOv5-s on COCO, pruned layer by layer: localization-aware pruning (LCP, arXiv 1911.02237):
#   python tools/prune.py configs/prune/yolov5_s_coco_lcp.py CHECKPOINT --calib-batches 16
# More batches make it better and slower.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

prune_cfg = dict(
    target_flops=0.5, criterion=dict(type='mmgcp.LCP', epochs=5, lr_steps=(3, )))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
