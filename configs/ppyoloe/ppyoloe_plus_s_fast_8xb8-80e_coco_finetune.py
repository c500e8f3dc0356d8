# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned PPYOLOE+-s, which this command writes:
#   python tools/prune.py mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py \
#       work_dirs/ppyoloe_plus_s_fast_8xb8-80e_coco_sparse/epoch_20.pth --target-params 0.5 \
#       --criterion BestOf
_base_ = '../_base_/finetune/ppyoloe_plus_s_coco.py'

pruned = 'work_dirs/ppyoloe_plus_s_fast_8xb8-80e_coco-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
max_epochs = 40
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(param_scheduler=dict(total_epochs=int(max_epochs * 1.2)))
