# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv4 on COCO with the unpruned one as its teacher.
_base_ = './yolov4_syncbn_fast_8xb16-300e_coco_finetune.py'

model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=_base_.baseline,
    groups=_base_.attention_groups)
