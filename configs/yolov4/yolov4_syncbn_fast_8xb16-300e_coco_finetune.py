# Fine-tuning of the pruned YOLOv4 on COCO, which this command writes:
#   python tools/prune.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py \
#       work_dirs/yolov4_syncbn_fast_8xb16-300e_coco_sparse/epoch_50.pth
_base_ = '../../work_dirs/yolov4_syncbn_fast_8xb16-300e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
