# Sparse training of MMYOLO's YOLOX-s:
#   python tools/train.py configs/yolox/yolox_s_fast_8xb8-300e_coco_sparse.py
_base_ = 'mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'https://download.openmmlab.com/mmyolo/v0/yolox/yolox_s_fast_8xb8-300e_coco/yolox_s_fast_8xb8-300e_coco_20230213_142600-2b224d8b.pth'  # noqa
max_epochs = 50
# Typical are 1e-4 to 1e-3: a scale factor moves by up to lr / (1 - momentum) * rate an iteration
sparsity_rate = 1e-3

# ===============================Unmodified in most cases====================
switch_epoch = max_epochs - _base_.num_last_epochs
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='mmgcp.DynamicSparsityHook',
        rate=sparsity_rate,
        schedule=dict(type='two_phase'),
        modules='prunable')
]
train_cfg = dict(
    max_epochs=max_epochs, val_interval=10, dynamic_intervals=[(switch_epoch, 1)])
param_scheduler = [
    _base_.param_scheduler[0],  # warm-up
    dict(_base_.param_scheduler[1], T_max=switch_epoch, end=switch_epoch),
    dict(_base_.param_scheduler[2], begin=switch_epoch, end=max_epochs)
]
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
