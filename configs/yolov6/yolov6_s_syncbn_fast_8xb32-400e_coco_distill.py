# Distilling: as the fine-tuning of the pruned YOLOv6-s, but with the unpruned as teacher.
_base_ = './yolov6_s_syncbn_fast_8xb32-400e_coco_finetune.py'

teacher_config = 'mmyolo::yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco/yolov6_s_syncbn_fast_8xb32-400e_coco_20221102_203035-932e1d91.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
