# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv7-tiny with the unpruned one as its teacher.
_base_ = './yolov7_tiny_syncbn_fast_8x16b-300e_coco_finetune.py'

model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=_base_.baseline,
    groups='auto')
