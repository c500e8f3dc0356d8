# Fine-tuning of the pruned YOLOX-s, which this command writes:
#   python tools/prune.py mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py \
#       work_dirs/yolox_s_fast_8xb8-300e_coco_sparse/epoch_50.pth --target-params 0.5
_base_ = '../../work_dirs/yolox_s_fast_8xb8-300e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.num_last_epochs
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
param_scheduler = [
    _base_.param_scheduler[0],  # warm-up
    dict(_base_.param_scheduler[1], T_max=switch_epoch, end=switch_epoch),
    dict(_base_.param_scheduler[2], begin=switch_epoch, end=max_epochs)
]
