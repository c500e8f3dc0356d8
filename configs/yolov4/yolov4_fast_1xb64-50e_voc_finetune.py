# Fine-tuning of the pruned YOLOv4 on PASCAL VOC, which this command writes:
#   python tools/prune.py configs/yolov4/yolov4_fast_1xb64-50e_voc.py \
#       work_dirs/yolov4_fast_1xb64-50e_voc_sparse/epoch_50.pth
_base_ = '../../work_dirs/yolov4_fast_1xb64-50e_voc-pruned/pruned.py'

# ========================Frequently modified parameters======================
max_epochs = 50

# ===============================Unmodified in most cases====================
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
