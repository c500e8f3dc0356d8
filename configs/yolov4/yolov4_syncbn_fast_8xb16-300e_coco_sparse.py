# Sparse training of YOLOv4 on COCO, after the baseline's training:
#   python tools/train.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py
#   python tools/train.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco_sparse.py
_base_ = './yolov4_syncbn_fast_8xb16-300e_coco.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/yolov4_syncbn_fast_8xb16-300e_coco/epoch_300.pth'
max_epochs = 50
# Typical are 1e-4 to 1e-3: a scale factor moves by up to lr / (1 - momentum) * rate an iteration
sparsity_rate = 1e-3

# ===============================Unmodified in most cases====================
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='mmgcp.DynamicSparsityHook',
        rate=sparsity_rate,
        schedule=dict(type='two_phase'),
        modules='prunable')
]
train_cfg = dict(max_epochs=max_epochs, val_interval=10)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
