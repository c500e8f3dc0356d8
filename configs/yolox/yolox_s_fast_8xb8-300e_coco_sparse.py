# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of YOLOX-s:
#   python tools/train.py configs/yolox/yolox_s_fast_8xb8-300e_coco_sparse.py
_base_ = ['../_base_/finetune/yolox_s_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
custom_hooks = [*_base_.custom_hooks, _base_.sparsity_hook]
