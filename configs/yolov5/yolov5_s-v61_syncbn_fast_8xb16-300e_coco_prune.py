# Not trained yet.
# MMYOLO's YOLOv5-s, pruned without sparse training: by what no other channels can make up for.
#   python tools/prune.py configs/yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_prune.py
# `--criterion NAME` takes another criterion with its defaults; docs/criteria.md lists them.
_base_ = '../_base_/finetune/yolov5_s_coco.py'

load_from = _base_.baseline.checkpoint
prune_cfg = dict(target_flops=0.5, criterion=dict(type='mmgcp.OBS'))
