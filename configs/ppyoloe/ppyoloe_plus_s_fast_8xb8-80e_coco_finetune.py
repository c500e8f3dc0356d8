# Fine-tuning of the pruned PPYOLOE+-s, which this command writes:
#   python tools/prune.py mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py \
#       work_dirs/ppyoloe_plus_s_fast_8xb8-80e_coco_sparse/epoch_20.pth --target-params 0.5
_base_ = '../../work_dirs/ppyoloe_plus_s_fast_8xb8-80e_coco-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 40

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
# PPYOLOE's cosine ends behind the training
default_hooks = dict(param_scheduler=dict(warmup_epochs=1, total_epochs=int(max_epochs * 1.2)))
# The first assigner is for untrained networks
model = dict(train_cfg=dict(initial_epoch=0))
