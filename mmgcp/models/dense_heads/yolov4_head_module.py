# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import List, Sequence, Tuple, Union

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.utils import multi_apply
from mmdet.utils import ConfigType, OptMultiConfig
from mmyolo.models.dense_heads import YOLOv5HeadModule
from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.checks import (
    CHANNEL_LIST,
    CHANNELS,
    CONFIG_OR_NONE,
    COUNT,
    FACTOR,
    checked,
    either,
    list_of,
    number_in,
)


@MODELS.register_module()
class YOLOv4HeadModule(YOLOv5HeadModule):
    """The layers of YOLOv4's head: a 3x3 and a prediction convolution on each level.

    Args:
        num_classes (int): Number of foreground classes.
        in_channels (int | Sequence[int]): Number of channels of each level, before
            widening.
        widen_factor (float): Multiplier of the number of channels. Defaults to 1.0.
        num_base_priors (int): Number of anchors of a level. Defaults to 3.
        featmap_strides (Sequence[int]): Stride of each level in pixels.
            Defaults to (8, 16, 32).
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers. Defaults to LeakyReLU(0.1).
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    @checked(num_classes=number_in(1, 2**16, integer=True),
             in_channels=either(CHANNELS, CHANNEL_LIST, text=CHANNEL_LIST.text),
             widen_factor=FACTOR,
             num_base_priors=number_in(1, 64, integer=True), norm_cfg=CONFIG_OR_NONE,
             act_cfg=CONFIG_OR_NONE,
             featmap_strides=list_of(COUNT, 'must be a list of strides'))
    def __init__(self,
                 num_classes: int,
                 in_channels: Union[int, Sequence[int]],
                 widen_factor: float = 1.0,
                 num_base_priors: int = 3,
                 featmap_strides: Sequence[int] = (8, 16, 32),
                 norm_cfg: ConfigType = dict(type='BN', momentum=0.03, eps=0.001),
                 act_cfg: ConfigType = dict(type='LeakyReLU', negative_slope=0.1, inplace=True),
                 init_cfg: OptMultiConfig = None):
        self.norm_cfg = norm_cfg
        self.act_cfg = act_cfg
        super().__init__(
            num_classes,
            in_channels,
            widen_factor=widen_factor,
            num_base_priors=num_base_priors,
            featmap_strides=featmap_strides,
            init_cfg=init_cfg)

    def init_weights(self):
        """Initialise the parameters, the biases for rare objects as in YOLOv5."""
        for conv in self.convs_bridge:
            conv.conv.reset_parameters()
        super().init_weights()

    def _init_layers(self):
        self.convs_bridge = nn.ModuleList()
        self.convs_pred = nn.ModuleList()
        for channels in self.in_channels:
            self.convs_bridge.append(
                ConvModule(channels, 2 * channels, 3, padding=1,
                           norm_cfg=self.norm_cfg, act_cfg=self.act_cfg))
            self.convs_pred.append(
                nn.Conv2d(2 * channels, self.num_base_priors * self.num_out_attrib, 1))

    def forward(self, x: Tuple[Tensor]) -> Tuple[List[Tensor]]:
        """Predict on the levels of the pyramid.

        Args:
            x (tuple[Tensor]): A feature map (N, C, H, W) for each level.

        Returns:
            tuple[list[Tensor]]: For each level the class scores (N, A * num_classes,
            H, W), the box predictions (N, A * 4, H, W) and the objectnesses
            (N, A, H, W) of A anchors, all raw (before the sigmoid).
        """
        return multi_apply(self.forward_single, x, self.convs_bridge, self.convs_pred)

    def forward_single(self, x: Tensor, conv_bridge: nn.Module,
                       conv_pred: nn.Module) -> Tuple[Tensor, Tensor, Tensor]:
        """Predict on one level; see :meth:`forward`."""
        return super().forward_single(conv_bridge(x), conv_pred)
