# Not trained yet.
# Fine-tuning of the SSD300 with a VGG-16 that was pruned by LCP; this command writes it:
#   python tools/prune.py configs/ssd/ssd300_vgg16_lcp_1xb8-24e_voc0712_prune.py \
#       --no-compensate --calib-batches 2000
_base_ = '../_base_/schedules/ssd300_voc0712_iterations.py'

# ========================Frequently modified parameters======================
base_lr = 5e-4
max_iters = 60000

# ===============================Unmodified in most cases====================
pruned = 'work_dirs/ssd300_vgg16_lcp_1xb8-24e_voc0712_prune-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(
        type='MultiStepLR',
        begin=0,
        end=max_iters,
        by_epoch=False,
        milestones=[30000, 45000],
        gamma=0.1)
]
train_cfg = dict(max_iters=max_iters)
