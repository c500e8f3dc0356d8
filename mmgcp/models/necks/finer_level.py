# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Necks with one level more, at half their smallest stride, that no other level reads."""
from typing import Callable, List

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.backbones.csp_darknet import CSPLayer
from mmdet.utils import ConfigType
from mmengine.model import BaseModule
from mmyolo.models.necks import YOLOv5PAFPN
from mmyolo.models.utils import make_divisible, make_round
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.models.layers import alternating_convs
from mmgcp.registry import MODELS
from mmgcp.utils.checks import CHANNEL_LIST, checked

from .yolov4_pafpn import YOLOv4PAFPN


class FinerLevel(BaseModule):
    """Compute a level from the next coarser one and a map of the backbone.

    Args:
        coarse_channels (int): Number of channels of the coarser level.
        in_channels (int): Number of channels of the backbone's map.
        out_channels (int): Number of channels of this level.
        build_fusion (Callable): Makes the layers that merge a map of 2 * ``out_channels``
            channels into one of ``out_channels``.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers.
    """

    def __init__(self, coarse_channels: int, in_channels: int, out_channels: int,
                 build_fusion: Callable[[int], nn.Module], norm_cfg: ConfigType,
                 act_cfg: ConfigType):
        super().__init__()
        layers = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.reduce = ConvModule(coarse_channels, out_channels, 1, **layers)
        self.lateral = ConvModule(in_channels, out_channels, 1, **layers)
        self.upsample = nn.Upsample(scale_factor=2, mode='nearest')
        self.fusion = build_fusion(out_channels)

    def forward(self, coarse: Tensor, lateral: Tensor) -> Tensor:
        """Merge (N, coarse_channels, H / 2, W / 2) and (N, in_channels, H, W)."""
        coarse = self.upsample(self.reduce(coarse))
        return self.fusion(torch.cat((coarse, self.lateral(lateral)), 1))


class FinerLevelMixin:
    """Give a neck of MMYOLO one level more, called ``finer``.

    The other levels are computed as without it, and have the same names: a checkpoint of the
    detector without it has all their weights.
    """

    @checked(in_channels=CHANNEL_LIST, out_channels=CHANNEL_LIST)
    def __init__(self, in_channels: List[int], out_channels: List[int], **kwargs):
        if len(in_channels) != len(out_channels) or len(in_channels) < 3:
            raise UserError(
                'in_channels and out_channels must have a number for each of at least three '
                f'levels, but are {in_channels} and {out_channels}')
        super().__init__(in_channels=in_channels[1:], out_channels=out_channels[1:], **kwargs)
        inputs, *outputs = (make_divisible(channels, self.widen_factor)
                            for channels in (in_channels[0], *out_channels[:2]))
        self.finer = FinerLevel(outputs[1], inputs, outputs[0], self.build_fusion,
                                self.norm_cfg, self.act_cfg)

    def forward(self, inputs: List[Tensor]) -> tuple:
        """Map the backbone's maps to the levels, both from the smallest stride on."""
        outputs = super().forward(inputs[1:])
        return (self.finer(outputs[0], inputs[0]), *outputs)


@MODELS.register_module()
class YOLOv4FinerPAFPN(FinerLevelMixin, YOLOv4PAFPN):
    """The neck of YOLOv4 with one level more, such as that of stride 4.

    Args:
        in_channels (List[int]): Number of channels of each input, before widening; the first is
            that of the finer level.
        out_channels (List[int]): Number of channels of each output, before widening.
        **kwargs: See :class:`mmgcp.models.YOLOv4PAFPN`.
    """

    def build_fusion(self, channels: int) -> nn.Module:
        """Build the five convolutions that merge two maps, as on the other levels."""
        return alternating_convs(
            2 * channels, channels, 5, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)


@MODELS.register_module()
class YOLOv5FinerPAFPN(FinerLevelMixin, YOLOv5PAFPN):
    """The neck of YOLOv5 with one level more, such as that of stride 4.

    Args:
        in_channels (List[int]): Number of channels of each input, before widening; the first is
            that of the finer level.
        out_channels (List[int]): Number of channels of each output, before widening.
        **kwargs: See :class:`mmyolo.models.YOLOv5PAFPN`.
    """

    def build_fusion(self, channels: int) -> nn.Module:
        """Build the cross-stage partial layer that merges two maps, as on the other levels."""
        return CSPLayer(
            2 * channels,
            channels,
            num_blocks=make_round(self.num_csp_blocks, self.deepen_factor),
            add_identity=False,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)
