# Not trained yet.
# MMDetection's SSD300 with a VGG-16, trained on PASCAL VOC 07+12 trainval and tested on 07 test.
_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'
custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)
