# Fine-tuning of the pruned RTMDet-s, which this command writes:
#   python tools/prune.py mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py \
#       work_dirs/rtmdet_s_syncbn_fast_8xb32-300e_coco_sparse/epoch_50.pth --target-params 0.5
_base_ = '../../work_dirs/rtmdet_s_syncbn_fast_8xb32-300e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.num_epochs_stage2
custom_hooks = [
    _base_.custom_hooks[0],  # EMA
    dict(_base_.custom_hooks[1], switch_epoch=switch_epoch)
]
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
param_scheduler = [
    _base_.param_scheduler[0],  # warm-up
    dict(
        _base_.param_scheduler[1],
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs - max_epochs // 2)
]
