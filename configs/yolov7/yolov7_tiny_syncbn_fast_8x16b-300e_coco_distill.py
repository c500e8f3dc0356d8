# Distilling: as the fine-tuning of the pruned YOLOv7-tiny, but with the unpruned as teacher.
_base_ = './yolov7_tiny_syncbn_fast_8x16b-300e_coco_finetune.py'

teacher_config = 'mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py'
teacher_checkpoint = 'https://download.openmmlab.com/mmyolo/v0/yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco/yolov7_tiny_syncbn_fast_8x16b-300e_coco_20221126_102719-0ee5bbdf.pth'  # noqa
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups='auto')
