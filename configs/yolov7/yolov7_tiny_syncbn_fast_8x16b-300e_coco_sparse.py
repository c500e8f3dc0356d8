# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOv7-tiny:
#   python tools/train.py configs/yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco_sparse.py
_base_ = ['../_base_/finetune/yolov7_tiny_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
