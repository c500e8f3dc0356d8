# Localization-aware channel pruning (LCP, arXiv 1911.02237) of SSD300 with a ResNet-50 on PASCAL
# VOC, after the baseline's training:
#   python tools/train.py configs/ssd/ssd300_r50_voc0712.py
#   python tools/prune.py configs/lcp/ssd300_r50_voc_lcp.py --no-compensate --calib-batches 2000
# An epoch are the batches of --calib-batches, of 8 images. 2000 of them are about all of VOC
# 07+12, as in the paper, and take days; some ten are enough for a try.
_base_ = '../ssd/ssd300_r50_voc0712.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/ssd300_r50_voc0712/iter_120000.pth'
# Share of the channels of conv1-x to conv4-x that is removed; 0.5, 0.7 and 0.75 in the paper
ratio = 0.7

# ===============================Unmodified in most cases====================
prune_cfg = dict(
    groups=[
        dict(
            name='conv1-x to conv4-x',
            modules=['backbone.conv1', 'backbone.layer[123]'],
            ratio=ratio)
    ],
    criterion=dict(type='mmgcp.LCP', epochs=15, lr=1e-3, lr_steps=(5, 10)),
    compensate=False)
