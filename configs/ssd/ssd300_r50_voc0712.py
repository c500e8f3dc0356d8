# SSD300 with a ResNet-50 up to its third stage (stride 16), on PASCAL VOC: trained on 07+12
# trainval, tested on 07 test. The feature maps are as large as those of SSD300 with a VGG-16.
_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
base_lr = 1e-3
max_iters = 120000
train_batch_size_per_gpu = 32

# ===============================Unmodified in most cases====================
backbone_channels = (512, 1024)
level_channels = (*backbone_channels, 512, 256, 256, 256)
model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    # The scale of the L2 norm is for the first feature map of a VGG, which has no BatchNorm
    neck=dict(
        in_channels=backbone_channels, out_channels=level_channels, l2_norm_scale=None),
    bbox_head=dict(in_channels=level_channels))

train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
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
