# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv4 on PASCAL VOC, which this command writes:
#   python tools/prune.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py \
#       work_dirs/yolov4_fast_1xb64-50e_voc_sparse/epoch_50.pth --criterion BestOf
_base_ = '../_base_/finetune/yolov4_voc.py'

pruned = 'work_dirs/yolov4_fast_1xb64-50e_voc-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
