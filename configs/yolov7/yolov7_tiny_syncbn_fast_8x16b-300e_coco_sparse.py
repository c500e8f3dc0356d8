# Sparse training of MMYOLO's YOLOv7-tiny:
#   python tools/train.py configs/yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco_sparse.py
_base_ = 'mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'https://download.openmmlab.com/mmyolo/v0/yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco/yolov7_tiny_syncbn_fast_8x16b-300e_coco_20221126_102719-0ee5bbdf.pth'  # noqa
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
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
