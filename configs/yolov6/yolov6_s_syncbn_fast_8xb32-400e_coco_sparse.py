# Sparse training of MMYOLO's YOLOv6-s:
#   python tools/train.py configs/yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco_sparse.py
_base_ = 'mmyolo::yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'https://download.openmmlab.com/mmyolo/v0/yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco/yolov6_s_syncbn_fast_8xb32-400e_coco_20221102_203035-932e1d91.pth'  # noqa
max_epochs = 50
# Typical are 1e-4 to 1e-3: a scale factor moves by up to lr / (1 - momentum) * rate an iteration
sparsity_rate = 1e-3

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.num_last_epochs
custom_hooks = [
    _base_.custom_hooks[0],  # EMA
    dict(_base_.custom_hooks[1], switch_epoch=switch_epoch),
    dict(
        type='mmgcp.DynamicSparsityHook',
        rate=sparsity_rate,
        schedule=dict(type='two_phase'),
        modules='prunable')
]
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
# The first assigner is for untrained networks
model = dict(train_cfg=dict(initial_epoch=0))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
