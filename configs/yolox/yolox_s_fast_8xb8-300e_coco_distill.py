# Distilling: as the fine-tuning of the pruned YOLOX-s, but with the unpruned as teacher.
_base_ = './yolox_s_fast_8xb8-300e_coco_finetune.py'

teacher_config = 'mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/yolox/yolox_s_fast_8xb8-300e_coco/yolox_s_fast_8xb8-300e_coco_20230213_142600-2b224d8b.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
