# MMYOLO's trained PPYOLOE+-s and a short schedule for the stages that train it further.
_base_ = 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
baseline = dict(
    config='mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    checkpoint='https://download.openmmlab.com/mmyolo/v0/ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco/ppyoloe_plus_s_fast_8xb8-80e_coco_20230101_154052-9fee7619.pth')
max_epochs = 20

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
# PPYOLOE's cosine goes on beyond the end of the training
default_hooks = dict(param_scheduler=dict(warmup_epochs=1, total_epochs=int(max_epochs * 1.2)))
# The first assigner is for networks that have yet to be trained
model = dict(train_cfg=dict(initial_epoch=0))
# Stated again because MMEngine cannot call a collate function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate', use_ms_training=True))
