# SSD300 on PASCAL VOC 07+12, trained for a number of iterations instead of epochs.
_base_ = '../../ssd/ssd300_vgg16_1xb8-24e_voc0712.py'

train_batch_size_per_gpu = 32
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=120000, val_interval=10000)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=10000), logger=dict(interval=100))
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=train_batch_size_per_gpu)
