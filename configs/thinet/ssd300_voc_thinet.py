# ThiNet-Conv (arXiv 1707.06342) on SSD300 with VGG-16: half of the channels of
# conv1_1 to conv4_3, one layer after the other with a training of one epoch in between:
#   python tools/prune.py configs/thinet/ssd300_voc_thinet.py \
#       work_dirs/ssd300_voc/epoch_24.pth --calib-batches 128
# The paper's factors are found without folding means; --no-compensate does that.
_base_ = './ssd300_voc.py'

# Go through the data once an epoch
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
    finetune=dict(epochs=1, lr=1e-3, every=1))
