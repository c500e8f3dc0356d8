# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOX-s, which this command writes:
#   python tools/prune.py mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py \
#       work_dirs/yolox_s_fast_8xb8-300e_coco_sparse/epoch_50.pth --target-params 0.5 \
#       --criterion BestOf
_base_ = '../_base_/finetune/yolox_s_coco.py'

pruned = 'work_dirs/yolox_s_fast_8xb8-300e_coco-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
