# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOv6-s:
#   python tools/train.py configs/yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco_sparse.py
_base_ = ['../_base_/finetune/yolov6_s_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
