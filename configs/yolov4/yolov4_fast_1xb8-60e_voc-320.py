# The whole YOLOv4 for a GPU and one small folder in VOC format.
_base_ = './yolov4_n_fast_1xb8-60e_voc-320.py'

base_lr = 0.01
# The shares of parameters and MACs that the paper keeps on PASCAL VOC
prune_cfg = dict(target_params=0.353, target_flops=0.651, round_to=16)

model = dict(
    backbone=dict(deepen_factor=1.0, widen_factor=1.0),
    neck=dict(deepen_factor=1.0, widen_factor=1.0),
    bbox_head=dict(head_module=dict(widen_factor=1.0)))
train_dataloader = dict(num_workers=4)
optim_wrapper = dict(optimizer=dict(lr=base_lr))
