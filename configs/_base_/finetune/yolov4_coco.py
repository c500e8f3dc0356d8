# The trained YOLOv4 on COCO and a short schedule for the stages that train it further.
_base_ = '../../yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py'

# ========================Frequently modified parameters======================
baseline = dict(
    config='configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py',
    checkpoint='work_dirs/yolov4_syncbn_fast_8xb16-300e_coco/epoch_300.pth')
max_epochs = 50

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
