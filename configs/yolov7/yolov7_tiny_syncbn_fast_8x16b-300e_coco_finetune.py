# Fine-tuning of the pruned YOLOv7-tiny, which this command writes:
#   python tools/prune.py mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py \
#       work_dirs/yolov7_tiny_syncbn_fast_8x16b-300e_coco_sparse/epoch_50.pth --target-params 0.5
_base_ = '../../work_dirs/yolov7_tiny_syncbn_fast_8x16b-300e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
