# MMYOLO's trained YOLOX-s and a short schedule for the stages that train it further.
_base_ = 'mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
baseline = dict(
    config='mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py',
    checkpoint='https://download.openmmlab.com/mmyolo/v0/yolox/yolox_s_fast_8xb8-300e_coco/yolox_s_fast_8xb8-300e_coco_20230213_142600-2b224d8b.pth')
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
# Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
