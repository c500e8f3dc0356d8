# ThiNet on YOLOv4 and PASCAL VOC, with a short training after every fifth set of layers:
#   python tools/prune.py configs/prune/yolov4_voc_thinet.py \
#       work_dirs/yolov4_fast_1xb64-50e_voc/epoch_50.pth --calib-batches 16
_base_ = '../yolov4/yolov4_fast_1xb64-50e_voc.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# The layer groups and shares of parameters and MACs to keep are the base's
prune_cfg = dict(
    criterion=dict(_delete_=True, type='mmgcp.ThiNet', positions=100),
    # A learning rate of None is a tenth of the config's
    finetune=dict(epochs=1, lr=None, every=5))
