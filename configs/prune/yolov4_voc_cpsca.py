# YOLOv4 on PASCAL VOC with spatial and channel attention, to be pruned by it (CPSCA, arXiv
# 2011.03891), after the baseline's training:
#   python tools/train.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py
#   python tools/train.py configs/prune/yolov4_voc_cpsca.py
#   python tools/prune.py configs/prune/yolov4_voc_cpsca.py \
#       work_dirs/yolov4_voc_cpsca/epoch_50.pth --calib-batches 16
# The pruned detector has no attention. Fine-tune it: it is work_dirs/yolov4_voc_cpsca-pruned.
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

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
# The layer groups and the target are those of the base
prune_cfg = dict(criterion=dict(_delete_=True, type='mmgcp.CPSCA', fold_scales=True))
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
