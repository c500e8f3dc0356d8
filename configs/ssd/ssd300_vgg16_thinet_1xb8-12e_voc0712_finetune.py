# Not trained yet.
# The final, longer training of the SSD300 that was pruned by ThiNet, with a learning rate from 1e-3
# to 1e-5 as in the paper. This command writes the pruned detector:
#   python tools/prune.py configs/ssd/ssd300_vgg16_thinet_1xb8-24e_voc0712_prune.py \
#       --calib-batches 128
_base_ = './ssd300_vgg16_thinet_1xb8-24e_voc0712_prune.py'

# ========================Frequently modified parameters======================
max_epochs = 12

# ===============================Unmodified in most cases====================
pruned = 'work_dirs/ssd300_vgg16_thinet_1xb8-24e_voc0712_prune-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=_base_.base_lr))
param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[4, 8], gamma=0.1)
]
