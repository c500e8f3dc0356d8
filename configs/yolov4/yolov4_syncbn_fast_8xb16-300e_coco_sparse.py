# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOv4 on COCO, after that of the baseline:
#   python tools/train.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco.py
#   python tools/train.py configs/yolov4/yolov4_syncbn_fast_8xb16-300e_coco_sparse.py
_base_ = ['../_base_/finetune/yolov4_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
