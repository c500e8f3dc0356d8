# Not trained yet, only run for a few iterations with narrow layers.
# Fine-tuning of the pruned YOLOv5-s, which this command writes:
#   python tools/prune.py mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py \
#       work_dirs/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_sparse/epoch_50.pth --target-params 0.5 \
#       --criterion BestOf
_base_ = '../_base_/finetune/yolov5_s_coco.py'

pruned = 'work_dirs/yolov5_s-v61_syncbn_fast_8xb16-300e_coco-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
