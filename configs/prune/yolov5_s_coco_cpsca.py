# MMYOLO's YOLOv5-s with spatial and channel attention, to be pruned by it (CPSCA, arXiv
# 2011.03891):
#   python tools/train.py configs/prune/yolov5_s_coco_cpsca.py
#   python tools/prune.py configs/prune/yolov5_s_coco_cpsca.py \
#       work_dirs/yolov5_s_coco_cpsca/epoch_50.pth --calib-batches 16
# The pruned detector has no attention. Fine-tune it: it is work_dirs/yolov5_s_coco_cpsca-pruned.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'https://download.openmmlab.com/mmyolo/v0/yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_20220918_084700-86e02187.pth'  # noqa
max_epochs = 50
# Patterns of layers, or 'prunable' for all that can be pruned
attention_modules = 'prunable'

# ===============================Unmodified in most cases====================
model = dict(
    type='mmgcp.SCADetector',
    detector_type=_base_.model.type,
    attention=dict(modules=attention_modules, num_groups=8))
prune_cfg = dict(criterion=dict(type='mmgcp.CPSCA', fold_scales=True), target_params=0.5)
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
