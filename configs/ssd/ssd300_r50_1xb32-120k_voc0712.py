# Not trained yet.
# SSD300 with a ResNet-50 up to its third stage (stride 16), trained on PASCAL VOC 07+12 trainval
# and tested on 07 test. Its feature maps are as large as those of SSD300 with a VGG-16.
# `prune_cfg` is localization-aware channel pruning (LCP, https://arxiv.org/abs/1911.02237):
#   python tools/train.py configs/ssd/ssd300_r50_1xb32-120k_voc0712.py
#   python tools/prune.py configs/ssd/ssd300_r50_1xb32-120k_voc0712.py \
#       work_dirs/ssd300_r50_1xb32-120k_voc0712/iter_120000.pth \
#       --no-compensate --calib-batches 2000
# An epoch of LCP is one pass over the batches of --calib-batches, each of 8 images: 2000 of them
# are about all of VOC 07+12, as in the paper, and take days. Some ten are enough for a try.
_base_ = '../_base_/schedules/ssd300_voc0712_iterations.py'

# ========================Frequently modified parameters======================
base_lr = 1e-3
max_iters = 120000
# Share of the channels of conv1-x to conv4-x to remove; 0.5, 0.7 and 0.75 in the paper
ratio = 0.7

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
    # The L2 norm's scale is for the first feature map of a VGG, which has no BatchNorm
    neck=dict(
        in_channels=backbone_channels, out_channels=level_channels, l2_norm_scale=None),
    bbox_head=dict(in_channels=level_channels))
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
train_cfg = dict(max_iters=max_iters)
prune_cfg = dict(
    groups=[
        dict(
            name='conv1-x to conv4-x',
            modules=['backbone.conv1', 'backbone.layer[123]'],
            ratio=ratio)
    ],
    criterion=dict(type='mmgcp.LCP', epochs=15, lr=1e-3, lr_steps=(5, 10)),
    compensate=False)
