# Distilling: as the fine-tuning of the pruned YOLOv8-s, but with the unpruned as teacher.
_base_ = './yolov8_s_syncbn_fast_8xb16-500e_coco_finetune.py'

teacher_config = 'mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco/yolov8_s_syncbn_fast_8xb16-500e_coco_20230117_180101-5aa5f0f1.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
