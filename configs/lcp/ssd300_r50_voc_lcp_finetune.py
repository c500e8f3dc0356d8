# Fine-tuning of the pruned SSD300 with a ResNet-50, which this command writes:
#   python tools/prune.py configs/lcp/ssd300_r50_voc_lcp.py --no-compensate --calib-batches 2000
_base_ = '../../work_dirs/ssd300_r50_voc_lcp-pruned/pruned.py'

# ========================Frequently modified parameters======================
base_lr = 1e-3
max_iters = 120000
train_batch_size_per_gpu = 32

# ===============================Unmodified in most cases====================
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(
        type='MultiStepLR',
        begin=0,
        end=max_iters,
        by_epoch=False,
        milestones=[80000, 100000],
        gamma=0.1)
]
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=10000)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=10000), logger=dict(interval=100))
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=train_batch_size_per_gpu)
