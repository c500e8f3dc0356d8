# Distilling: as the fine-tuning of the pruned RTMDet-s, but with the unpruned as teacher.
_base_ = './rtmdet_s_syncbn_fast_8xb32-300e_coco_finetune.py'

teacher_config = 'mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco/rtmdet_s_syncbn_fast_8xb32-300e_coco_20221230_182329-0a8c901a.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
