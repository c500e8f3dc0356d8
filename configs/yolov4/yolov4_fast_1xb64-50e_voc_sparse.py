# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOv4 on PASCAL VOC, after that of the baseline:
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc_sparse.py
_base_ = ['../_base_/finetune/yolov4_voc.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
