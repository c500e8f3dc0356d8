# MMYOLO's trained YOLOv8-s and a short schedule for the stages that train it further.
_base_ = 'mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
baseline = dict(
    config='mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py',
    checkpoint='https://download.openmmlab.com/mmyolo/v0/yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco/yolov8_s_syncbn_fast_8xb16-500e_coco_20230117_180101-5aa5f0f1.pth')
max_epochs = 50

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.close_mosaic_epochs
custom_hooks = [
    _base_.custom_hooks[0],  # EMA
    dict(_base_.custom_hooks[1], switch_epoch=switch_epoch)
]
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
# Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
