# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of PPYOLOE+-s:
#   python tools/train.py configs/ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco_sparse.py
_base_ = ['../_base_/finetune/ppyoloe_plus_s_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
# As high as the learning rate is low: a scale factor moves by up to
# lr / (1 - momentum) * rate per iteration
sparsity_rate = 5e-3
custom_hooks = [*_base_.custom_hooks, dict(_base_.sparsity_hook, rate=sparsity_rate)]
