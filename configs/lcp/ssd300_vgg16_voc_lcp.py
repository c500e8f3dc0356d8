# Localization-aware channel pruning (LCP, arXiv 1911.02237) of SSD300 with a VGG-16 on PASCAL
# VOC, after the baseline's training:
#   python tools/train.py mmdet::pascal_voc/ssd300_voc0712.py
#   python tools/prune.py configs/lcp/ssd300_vgg16_voc_lcp.py --no-compensate --calib-batches 2000
# An epoch are the batches of --calib-batches, of 8 images. 2000 of them are about all of VOC
# 07+12, as in the paper, and take days; some ten are enough for a try.
_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
load_from = 'work_dirs/ssd300_voc0712/epoch_24.pth'
# Share of the channels of conv1-1 to conv5-3 that is removed: a quarter of the MACs stays
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
