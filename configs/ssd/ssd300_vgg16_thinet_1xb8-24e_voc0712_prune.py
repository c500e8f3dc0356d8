# Not trained yet.
# ThiNet-Conv (https://arxiv.org/abs/1707.06342) on SSD300 with a VGG-16: half of the channels of
# conv1_1 to conv4_3, layer by layer, with one epoch of training after each. This follows the
# training of the baseline:
#   python tools/train.py configs/ssd/ssd300_vgg16_1xb8-24e_voc0712.py
#   python tools/prune.py configs/ssd/ssd300_vgg16_thinet_1xb8-24e_voc0712_prune.py \
#       --calib-batches 128
# The paper's factors are found without folding means, as with --no-compensate.
_base_ = './ssd300_vgg16_1xb8-24e_voc0712.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/ssd300_vgg16_1xb8-24e_voc0712/epoch_24.pth'
base_lr = 1e-3

# ===============================Unmodified in most cases====================
# An epoch is one pass over the data
train_dataloader = dict(dataset=dict(times=1))
prune_cfg = dict(
    # conv1_1, conv1_2, conv2_1, ... conv4_3 by their numbers in torch's VGG-16
    groups=[
        dict(
            name='conv1-4',
            modules=[f'backbone.features.{index}'
                     for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)],
            ratio=0.5)
    ],
    criterion=dict(type='mmgcp.ThiNet', positions=10),
    finetune=dict(epochs=1, lr=base_lr, every=1))
