# The longer training of the pruned SSD300 at the end, with a learning rate from 1e-3 to 1e-5
# as in the paper. This command writes the pruned one:
#   python tools/prune.py configs/thinet/ssd300_voc_thinet.py work_dirs/ssd300_voc/epoch_24.pth
_base_ = '../../work_dirs/ssd300_voc_thinet-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 12
base_lr = 1e-3

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[4, 8], gamma=0.1)
]
