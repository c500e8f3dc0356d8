# Distilling: as the fine-tuning of the pruned YOLOv4, but with the unpruned as teacher.
_base_ = './yolov4_fast_1xb64-50e_voc_finetune.py'

teacher_config = 'configs/yolov4/yolov4_fast_1xb64-50e_voc.py'
teacher_checkpoint = 'work_dirs/yolov4_fast_1xb64-50e_voc/epoch_50.pth'
# Of GCP-SAD's weights, which exceed MMYOLO's detection loss by far
attention_factor = 1e-4

groups = [
    dict(group, weight=attention_factor * group['weight']) for group in _base_.attention_groups
]
model = dict(
    _delete_=True,
    type='mmgcp.SpatialAttentionDistiller',
    student=_base_.model,
    teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
    groups=groups)
