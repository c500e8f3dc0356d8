# MMYOLO's trained RTMDet-s and a short schedule for the stages that train it further.
_base_ = 'mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
baseline = dict(
    config='mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py',
    checkpoint='https://download.openmmlab.com/mmyolo/v0/rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco/rtmdet_s_syncbn_fast_8xb32-300e_coco_20221230_182329-0a8c901a.pth')
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
# Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
