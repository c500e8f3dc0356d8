# Sparse training of YOLOv4 on PASCAL VOC, after the baseline's training:
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc_sparse.py
_base_ = './yolov4_fast_1xb64-50e_voc.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/yolov4_fast_1xb64-50e_voc/epoch_50.pth'
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
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
