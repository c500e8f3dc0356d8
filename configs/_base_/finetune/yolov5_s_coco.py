# MMYOLO's trained YOLOv5-s and a short schedule for the stages that train it further.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
baseline = dict(
    config='mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
    checkpoint='https://download.openmmlab.com/mmyolo/v0/yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_20220918_084700-86e02187.pth')
max_epochs = 50

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
# Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
