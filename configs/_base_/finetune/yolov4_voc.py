# The trained YOLOv4 on PASCAL VOC. The stages that train it further keep its schedule.
_base_ = '../../yolov4/yolov4_fast_1xb64-50e_voc.py'

# ========================Frequently modified parameters======================
baseline = dict(
    config='configs/yolov4/yolov4_fast_1xb64-50e_voc.py',
    checkpoint='work_dirs/yolov4_fast_1xb64-50e_voc/epoch_50.pth')
