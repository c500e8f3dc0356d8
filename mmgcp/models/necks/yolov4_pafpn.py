# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import List, Sequence

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.utils import ConfigType, OptMultiConfig
from mmyolo.models.necks import BaseYOLONeck
from mmyolo.models.utils import make_divisible

from mmgcp.models.layers import DefaultInitMixin, SPPBlock, alternating_convs
from mmgcp.registry import MODELS
from mmgcp.utils.checks import (
    BOOLEAN,
    CHANNEL_LIST,
    CONFIG_OR_NONE,
    FACTOR,
    checked,
    list_of,
    number_in,
)


@MODELS.register_module()
class YOLOv4PAFPN(DefaultInitMixin, BaseYOLONeck):
    """Spatial pyramid pooling and path aggregation network.

    That of `YOLOv4 <https://arxiv.org/abs/2004.10934>`_.

    Args:
        in_channels (List[int]): Number of channels of each input, before widening.
        out_channels (List[int]): Number of channels of each output, before widening.
        deepen_factor (float): Not used, because the neck of YOLOv4 has a fixed depth; it is
            there for configs that set it for all parts. Defaults to 1.0.
        widen_factor (float): Multiplier of the number of channels. Defaults to 1.0.
        spp_kernel_sizes (Sequence[int]): Kernel sizes of the max-poolings.
            Defaults to (5, 9, 13).
        freeze_all (bool): Whether to freeze the neck. Defaults to False.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers. Defaults to LeakyReLU(0.1).
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    @checked(in_channels=CHANNEL_LIST, out_channels=CHANNEL_LIST, deepen_factor=FACTOR,
             widen_factor=FACTOR, freeze_all=BOOLEAN, norm_cfg=CONFIG_OR_NONE,
             act_cfg=CONFIG_OR_NONE,
             spp_kernel_sizes=list_of(number_in(1, 99, integer=True), 'must be a list of sizes'))
    def __init__(self,
                 in_channels: List[int],
                 out_channels: List[int],
                 deepen_factor: float = 1.0,
                 widen_factor: float = 1.0,
                 spp_kernel_sizes: Sequence[int] = (5, 9, 13),
                 freeze_all: bool = False,
                 norm_cfg: ConfigType = dict(type='BN', momentum=0.03, eps=0.001),
                 act_cfg: ConfigType = dict(type='LeakyReLU', negative_slope=0.1, inplace=True),
                 init_cfg: OptMultiConfig = None):
        self.spp_kernel_sizes = spp_kernel_sizes
        super().__init__(
            in_channels=[make_divisible(channels, widen_factor) for channels in in_channels],
            out_channels=[make_divisible(channels, widen_factor) for channels in out_channels],
            deepen_factor=deepen_factor,
            widen_factor=widen_factor,
            upsample_feats_cat_first=False,
            freeze_all=freeze_all,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            init_cfg=init_cfg)

    def build_reduce_layer(self, idx: int) -> nn.Module:
        """Build the layer between input ``idx`` and the pyramid: an SPP block for the deepest."""
        if idx == len(self.in_channels) - 1:
            return SPPBlock(
                self.in_channels[idx],
                self.out_channels[idx],
                self.spp_kernel_sizes,
                norm_cfg=self.norm_cfg,
                act_cfg=self.act_cfg)
        return self._conv(self.in_channels[idx], self.out_channels[idx], 1)

    def build_upsample_layer(self, idx: int) -> nn.Module:
        """Build the 1x1 convolution and the upsampling from level ``idx`` to the one above."""
        return nn.Sequential(
            self._conv(self.out_channels[idx], self.out_channels[idx - 1], 1),
            nn.Upsample(scale_factor=2, mode='nearest'))

    def build_top_down_layer(self, idx: int) -> nn.Module:
        """Build the five convolutions that merge level ``idx`` into the one above."""
        return self._fusion(idx - 1)

    def build_downsample_layer(self, idx: int) -> nn.Module:
        """Build the stride-2 convolution from level ``idx`` to the one below."""
        return self._conv(self.out_channels[idx], self.out_channels[idx + 1], 3, stride=2)

    def build_bottom_up_layer(self, idx: int) -> nn.Module:
        """Build the five convolutions that merge level ``idx`` into the one below."""
        return self._fusion(idx + 1)

    def build_out_layer(self, idx: int) -> nn.Module:
        """Build an identity: the 3x3 convolution that follows belongs to the head."""
        return nn.Identity()

    def _conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        return ConvModule(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)

    def _fusion(self, idx: int) -> nn.Sequential:
        return alternating_convs(
            2 * self.out_channels[idx],
            self.out_channels[idx],
            5,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)
