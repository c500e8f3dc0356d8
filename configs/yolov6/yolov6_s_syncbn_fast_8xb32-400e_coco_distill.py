# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv6-s with the unpruned one as its teacher.
_base_ = './yolov6_s_syncbn_fast_8xb32-400e_coco_finetune.py'

model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=_base_.baseline,
    groups='auto')
