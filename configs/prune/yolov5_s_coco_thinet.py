# ThiNet on MMYOLO's YOLOv5-s and COCO, without training in between:
#   python tools/prune.py configs/prune/yolov5_s_coco_thinet.py --calib-batches 32
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

load_from = 'https://download.openmmlab.com/mmyolo/v0/yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco/yolov5_s-v61_syncbn_fast_8xb16-300e_coco_20220918_084700-86e02187.pth'  # noqa
prune_cfg = dict(
    groups='auto', target_params=0.5, criterion=dict(type='mmgcp.ThiNet', positions=100))
# Said anew because MMEngine cannot call a function inherited from `mmyolo::`
train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
