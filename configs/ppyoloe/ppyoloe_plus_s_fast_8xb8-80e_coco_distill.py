# Distilling: as the fine-tuning of the pruned PPYOLOE+-s, but with the unpruned as teacher.
_base_ = './ppyoloe_plus_s_fast_8xb8-80e_coco_finetune.py'

teacher_config = 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco/ppyoloe_plus_s_fast_8xb8-80e_coco_20230101_154052-9fee7619.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
