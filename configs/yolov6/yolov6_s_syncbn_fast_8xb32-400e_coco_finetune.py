# Fine-tuning of the pruned YOLOv6-s, which this command writes:
#   python tools/prune.py mmyolo::yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco.py \
#       work_dirs/yolov6_s_syncbn_fast_8xb32-400e_coco_sparse/epoch_50.pth --target-params 0.5
_base_ = '../../work_dirs/yolov6_s_syncbn_fast_8xb32-400e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.num_last_epochs
custom_hooks = [
    _base_.custom_hooks[0],  # EMA
    dict(_base_.custom_hooks[1], switch_epoch=switch_epoch)
]
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
# The first assigner is for untrained networks
model = dict(train_cfg=dict(initial_epoch=0))
