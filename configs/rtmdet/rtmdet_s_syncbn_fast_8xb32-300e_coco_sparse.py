# Not trained yet, only run for a few iterations with narrow layers.
# Sparse training of RTMDet-s:
#   python tools/train.py configs/rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco_sparse.py
_base_ = ['../_base_/finetune/rtmdet_s_coco.py', '../_base_/sparse/two_phase.py']

load_from = _base_.baseline.checkpoint
# Higher than for other detectors: with Adam, a scale factor moves by lr * rate per iteration
sparsity_rate = 2e-2
custom_hooks = [
    *_base_.custom_hooks,
    # Adam would normalise the scale of a gradient away
    dict(_base_.sparsity_hook, rate=sparsity_rate, penalty='proximal')
]
