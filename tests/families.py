# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""One config of every family and structural variant, some made narrow."""
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from mmgcp.utils.config import load_config

NARROW = {f'model.{part}.widen_factor': 0.25
          for part in ('backbone', 'neck', 'bbox_head.head_module')}

# Path in the package's configs, and options
FAMILIES = {
    'yolov5-n': ('mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py', {}),
    'yolov5-n-p6': ('mmyolo::yolov5/yolov5_n-p6-v62_syncbn_fast_8xb16-300e_coco.py', {}),
    'yolov5u-n': ('mmyolo::yolov5/yolov5u/yolov5u_n_syncbn_fast_8xb16-300e_coco.py', {}),
    'yolov6-n': ('mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py', {}),
    'yolov6-m': ('mmyolo::yolov6/yolov6_m_syncbn_fast_8xb32-300e_coco.py', NARROW),
    'yolov6-l': ('mmyolo::yolov6/yolov6_l_syncbn_fast_8xb32-300e_coco.py', NARROW),
    'yolov6-v3-n': ('mmyolo::yolov6/yolov6_v3_n_syncbn_fast_8xb32-300e_coco.py', {}),
    'yolov6-v3-m': ('mmyolo::yolov6/yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py', NARROW),
    'yolov6-v3-l': ('mmyolo::yolov6/yolov6_v3_l_syncbn_fast_8xb32-300e_coco.py', NARROW),
    'yolov7-tiny': ('mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py', {}),
    'yolov7-l': ('mmyolo::yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py', NARROW),
    'yolov7-x': ('mmyolo::yolov7/yolov7_x_syncbn_fast_8x16b-300e_coco.py', NARROW),
    'yolov7-w-p6': ('mmyolo::yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py', NARROW),
    'yolov7-d-p6': ('mmyolo::yolov7/yolov7_d-p6_syncbn_fast_8x16b-300e_coco.py', NARROW),
    'yolov7-e2e-p6': ('mmyolo::yolov7/yolov7_e2e-p6_syncbn_fast_8x16b-300e_coco.py', NARROW),
    'yolov8-n': ('mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', {}),
    'yolox-nano': ('mmyolo::yolox/yolox_nano_fast_8xb8-300e_coco.py', {}),
    'yolox-tiny': ('mmyolo::yolox/yolox_tiny_fast_8xb8-300e_coco.py', {}),
    'rtmdet-tiny': ('mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py', {}),
    'rtmdet-ins-s': ('mmyolo::rtmdet/rtmdet-ins_s_syncbn_fast_8xb32-300e_coco.py', {}),
    'ppyoloe-s': ('mmyolo::ppyoloe/ppyoloe_s_fast_8xb32-300e_coco.py', {}),
    'ppyoloe-plus-s': ('mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py', {}),
    'ssd300': ('mmdet::ssd/ssd300_coco.py', {}),
    'ssdlite': ('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', {}),
    'yolov3': ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', {}),
    'retinanet-r50': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', {}),
    'retinanet-x101': ('mmdet::retinanet/retinanet_x101-32x4d_fpn_1x_coco.py',
                       {'model.backbone.depth': 50}),
    'fcos-r50': ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {}),
    'faster-rcnn-r50': ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {}),
}

# One of each family: these are in the fast tier of the tests
REPRESENTATIVES = ['yolov5-n', 'yolov6-n', 'yolov7-tiny', 'yolov8-n', 'yolox-nano', 'rtmdet-tiny',
                   'ppyoloe-plus-s', 'ssdlite', 'yolov3', 'retinanet-r50', 'fcos-r50',
                   'faster-rcnn-r50']


def family_config(name: str) -> Config:
    """The config of a family, without pretrained weights."""
    path, options = FAMILIES[name]
    return load_config(path, {**options, 'model.backbone.init_cfg': None})


def compute_loss(model: torch.nn.Module, size: int) -> torch.Tensor:
    """The loss in train mode for two images of noise with three boxes."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    images = torch.rand(2, 3, size, size, generator=generator).to(dtype)
    boxes = torch.tensor([[.1, .1, .6, .7], [.3, .4, .9, .9], [0., 0., .3, .25]]) * size
    labels = torch.tensor([1, 2, 0])
    owners = torch.tensor([0, 1, 1])
    model.train()
    MessageHub.get_current_instance().update_info('epoch', 0)
    if model.__module__.startswith('mmyolo'):
        samples = dict(bboxes_labels=torch.cat((owners[:, None], labels[:, None], boxes), 1),
                       img_metas=[dict(batch_input_shape=(size, size))] * 2)
    else:
        samples = []
        for number in range(2):
            instances = InstanceData(bboxes=boxes[owners == number].to(dtype),
                                     labels=labels[owners == number])
            meta = dict(img_shape=(size, size), pad_shape=(size, size),
                        batch_input_shape=(size, size), scale_factor=(1., 1.))
            samples.append(DetDataSample(gt_instances=instances,
                                         ignored_instances=InstanceData(
                                             bboxes=torch.zeros(0, 4).to(dtype),
                                             labels=torch.zeros(0, dtype=torch.long)),
                                         metainfo=meta))
    losses = model.loss(images, samples)
    return model.parse_losses(losses)[0]
