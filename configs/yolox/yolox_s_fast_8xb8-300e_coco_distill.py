# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOX-s with the unpruned one as its teacher.
_base_ = './yolox_s_fast_8xb8-300e_coco_finetune.py'

model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=_base_.baseline,
    groups='auto')
