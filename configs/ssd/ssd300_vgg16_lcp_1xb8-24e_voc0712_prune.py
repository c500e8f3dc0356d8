# Not trained yet.
# Localization-aware channel pruning (LCP, https://arxiv.org/abs/1911.02237) of SSD300 with a
# VGG-16 on PASCAL VOC, after the training of the baseline:
#   python tools/train.py configs/ssd/ssd300_vgg16_1xb8-24e_voc0712.py
#   python tools/prune.py configs/ssd/ssd300_vgg16_lcp_1xb8-24e_voc0712_prune.py \
#       --no-compensate --calib-batches 2000
# An epoch of LCP is one pass over the batches of --calib-batches, each of 8 images: 2000 of them
# are about all of VOC 07+12, as in the paper, and take days. Some ten are enough for a try.
_base_ = './ssd300_vgg16_1xb8-24e_voc0712.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/ssd300_vgg16_1xb8-24e_voc0712/epoch_24.pth'
# Share of the channels of conv1-1 to conv5-3 to remove: a quarter of the MACs stays
ratio = 0.75

# ===============================Unmodified in most cases====================
prune_cfg = dict(
    groups=[
        dict(
            name='conv1-1 to conv5-3',
            modules=[
                'backbone.features.[0-9]', 'backbone.features.1[0-9]', 'backbone.features.2[0-8]'
            ],
            ratio=ratio)
    ],
    criterion=dict(
        type='mmgcp.LCP',
        epochs=10,
        lr=1e-3,
        lr_steps=(5, ),
        # A VGG has no normalisation: its feature maps differ in scale by orders of magnitude
        relative=True),
    compensate=False)
