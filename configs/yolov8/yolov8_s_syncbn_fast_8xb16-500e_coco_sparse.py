# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOv8-s:
#   python tools/train.py configs/yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco_sparse.py
_base_ = ['../_base_/finetune/yolov8_s_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
