# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv4 on COCO, which this command writes:
#   python tools/prune.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py \
#       work_dirs/yolov4_syncbn_fast_8xb16-300e_coco_sparse/epoch_50.pth --criterion BestOf
_base_ = '../_base_/finetune/yolov4_coco.py'

pruned = 'work_dirs/yolov4_syncbn_fast_8xb16-300e_coco-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
