# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The building blocks of YOLOv4 (`arXiv 2004.10934 <https://arxiv.org/abs/2004.10934>`_)."""
from typing import Sequence

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.layers.csp_layer import DarknetBottleneck
from mmdet.utils import ConfigType, OptMultiConfig
from mmengine.model import BaseModule
from torch import Tensor

from mmgcp.registry import MODELS

MODELS.register_module(module=nn.Mish, name='Mish')


class CSPDarknetLayer(BaseModule):
    """Cross-stage partial layer of CSPDarknet53.

    `CSPNet (arXiv 1911.11929) <https://arxiv.org/abs/1911.11929>`_.

    Unlike :class:`mmdet.models.layers.CSPLayer`, it has a 1x1 convolution (``post_conv``)
    after the residual blocks.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        mid_channels (int): Number of channels of each of the two paths.
        block_channels (int): Number of channels between the two convolutions of a residual
            block.
        num_blocks (int): Number of residual blocks.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 mid_channels: int,
                 block_channels: int,
                 num_blocks: int,
                 norm_cfg: ConfigType,
                 act_cfg: ConfigType,
                 init_cfg: OptMultiConfig = None):
        super().__init__(init_cfg=init_cfg)
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.short_conv = ConvModule(in_channels, mid_channels, 1, **cfg)
        self.main_conv = ConvModule(in_channels, mid_channels, 1, **cfg)
        self.blocks = nn.Sequential(*[
            DarknetBottleneck(
                mid_channels, mid_channels, expansion=block_channels / mid_channels, **cfg)
            for _ in range(num_blocks)
        ])
        self.post_conv = ConvModule(mid_channels, mid_channels, 1, **cfg)
        self.final_conv = ConvModule(2 * mid_channels, out_channels, 1, **cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        main = self.post_conv(self.blocks(self.main_conv(x)))
        return self.final_conv(torch.cat((main, self.short_conv(x)), dim=1))


class SPPBlock(BaseModule):
    """Spatial pyramid pooling with three convolutions before and after, as in YOLOv4.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of channels of the output and of the pooled map.
        kernel_sizes (Sequence[int]): Kernel sizes of the parallel max-poolings.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_sizes: Sequence[int],
                 norm_cfg: ConfigType,
                 act_cfg: ConfigType,
                 init_cfg: OptMultiConfig = None):
        super().__init__(init_cfg=init_cfg)
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.pre_convs = alternating_convs(in_channels, out_channels, 3, **cfg)
        self.poolings = nn.ModuleList(
            [nn.MaxPool2d(kernel, stride=1, padding=kernel // 2) for kernel in kernel_sizes])
        self.post_convs = alternating_convs(
            (len(kernel_sizes) + 1) * out_channels, out_channels, 3, **cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        x = self.pre_convs(x)
        # Darknet concatenates them from the largest kernel to the unpooled map.
        pooled = [pooling(x) for pooling in reversed(self.poolings)]
        return self.post_convs(torch.cat((*pooled, x), dim=1))


def alternating_convs(in_channels: int, out_channels: int, num_convs: int,
                      norm_cfg: ConfigType, act_cfg: ConfigType) -> nn.Sequential:
    """Build 1x1 convolutions to ``out_channels`` that alternate with 3x3 ones to twice as many.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        num_convs (int): Number of convolutions; odd, so that the first and the last are 1x1.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers.

    Returns:
        nn.Sequential: Maps (N, in_channels, H, W) to (N, out_channels, H, W).
    """
    convs = []
    for i in range(num_convs):
        kernel, channels = (1, out_channels) if i % 2 == 0 else (3, 2 * out_channels)
        convs.append(
            ConvModule(in_channels, channels, kernel, padding=kernel // 2,
                       norm_cfg=norm_cfg, act_cfg=act_cfg))
        in_channels = channels
    return nn.Sequential(*convs)


class DefaultInitMixin:
    """Initialise convolutions with PyTorch's default, as MMYOLO does for YOLOv5.

    ConvModule's own initialisation is about 2.4 times larger. For a convolution before a
    BatchNorm, that only changes the effective learning rate, which would be 6 times smaller.
    """

    def init_weights(self):
        """Initialise the parameters, with ``init_cfg`` if there is one."""
        if self.init_cfg is not None:
            super().init_weights()
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
