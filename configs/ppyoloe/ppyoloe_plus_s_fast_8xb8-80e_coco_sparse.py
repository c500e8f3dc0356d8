# Sparse training of MMYOLO's PPYOLOE+-s:
#   python tools/train.py configs/ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco_sparse.py
_base_ = 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'https://download.openmmlab.com/mmyolo/v0/ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco/ppyoloe_plus_s_fast_8xb8-80e_coco_20230101_154052-9fee7619.pth'  # noqa
max_epochs = 20
# As high as the learning rate is low: a scale factor moves by up to
# lr / (1 - momentum) * rate an iteration
sparsity_rate = 5e-3

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
# PPYOLOE's cosine ends behind the training
default_hooks = dict(param_scheduler=dict(warmup_epochs=1, total_epochs=int(max_epochs * 1.2)))
# The first assigner is for untrained networks
model = dict(train_cfg=dict(initial_epoch=0))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate', use_ms_training=True))
