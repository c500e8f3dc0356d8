# Not trained yet.
# YOLOv4 on PASCAL VOC, trained with spatial and channel attention and then pruned by it (CPSCA,
# https://arxiv.org/abs/2011.03891). This follows the training of the baseline:
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py
#   python tools/train.py configs/yolov4/yolov4_cpsca_fast_1xb64-50e_voc_prune.py
#   python tools/prune.py configs/yolov4/yolov4_cpsca_fast_1xb64-50e_voc_prune.py \
#       work_dirs/yolov4_cpsca_fast_1xb64-50e_voc_prune/epoch_50.pth --calib-batches 16
# The pruned detector has no attention. To fine-tune it, point the config of the fine-tuning to
# work_dirs/yolov4_cpsca_fast_1xb64-50e_voc_prune-pruned.
_base_ = './yolov4_fast_1xb64-50e_voc.py'

# ========================Frequently modified parameters======================
load_from = 'work_dirs/yolov4_fast_1xb64-50e_voc/epoch_50.pth'
max_epochs = 50
# Patterns of layers, or 'prunable' for all that can be pruned
attention_modules = 'prunable'

# ===============================Unmodified in most cases====================
model = dict(
    type='mmgcp.SCADetector',
    detector_type=_base_.model.type,
    attention=dict(modules=attention_modules, num_groups=8))
# The layer groups and the target are the base's
prune_cfg = dict(criterion=dict(type='mmgcp.CPSCA', fold_scales=True))
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
