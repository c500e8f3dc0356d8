# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import List, Sequence, Union

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.utils import ConfigType, OptMultiConfig
from mmyolo.models.backbones import BaseBackbone
from mmyolo.models.utils import make_divisible, make_round

from mmgcp.models.layers import CSPDarknetLayer, DefaultInitMixin
from mmgcp.registry import MODELS
from mmgcp.utils.checks import (
    BOOLEAN,
    CHANNELS,
    CONFIG_OR_NONE,
    FACTOR,
    MAPPING,
    checked,
    list_of,
    number_in,
)


@MODELS.register_module()
class YOLOv4CSPDarknet(DefaultInitMixin, BaseBackbone):
    """CSPDarknet53, the backbone of `YOLOv4 <https://arxiv.org/abs/2004.10934>`_.

    It returns the outputs of the stages in ``out_indices``. At widen_factor 1, stages 1 to 5
    have 64, 128, 256, 512 and 1024 channels at strides 2 to 32.

    Args:
        plugins (list[dict], optional): See :class:`mmyolo.models.BaseBackbone`.
        deepen_factor (float): Multiplier of the number of residual blocks.
            Defaults to 1.0.
        widen_factor (float): Multiplier of the number of channels, which is then rounded up
            to a multiple of 8. Defaults to 1.0.
        input_channels (int): Number of image channels. Defaults to 3.
        out_indices (Sequence[int]): Stages to output (0 is the stem).
            Defaults to (3, 4, 5).
        frozen_stages (int): Last stage to freeze; -1 freezes none. Defaults to -1.
        norm_cfg (dict): Config of the normalisation layers.
        act_cfg (dict): Config of the activation layers. Defaults to Mish.
        norm_eval (bool): Keep the statistics of BatchNorm fixed. Defaults to False.
        init_cfg (dict, optional): Initialisation config. Defaults to None.
    """

    # in_channels, out_channels, channels of a path, channels within a block, num_blocks
    arch_setting = [[32, 64, 64, 32, 1], [64, 128, 64, 64, 2], [128, 256, 128, 128, 8],
                    [256, 512, 256, 256, 8], [512, 1024, 512, 512, 4]]

    @checked(plugins=list_of(MAPPING, 'must be a list of dicts', empty=True),
             deepen_factor=FACTOR, widen_factor=FACTOR, input_channels=CHANNELS,
             out_indices=list_of(number_in(0, 5, integer=True), 'must be a list of 0 to 5'),
             frozen_stages=number_in(-1, 5, integer=True), norm_cfg=CONFIG_OR_NONE,
             act_cfg=CONFIG_OR_NONE,
             norm_eval=BOOLEAN)
    def __init__(self,
                 plugins: Union[dict, List[dict]] = None,
                 deepen_factor: float = 1.0,
                 widen_factor: float = 1.0,
                 input_channels: int = 3,
                 out_indices: Sequence[int] = (3, 4, 5),
                 frozen_stages: int = -1,
                 norm_cfg: ConfigType = dict(type='BN', momentum=0.03, eps=0.001),
                 act_cfg: ConfigType = dict(type='mmgcp.Mish', inplace=True),
                 norm_eval: bool = False,
                 init_cfg: OptMultiConfig = None):
        super().__init__(
            self.arch_setting,
            deepen_factor,
            widen_factor,
            input_channels=input_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            plugins=plugins,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            norm_eval=norm_eval,
            init_cfg=init_cfg)

    def build_stem_layer(self) -> nn.Module:
        """Build the stem, a 3x3 convolution at full resolution."""
        return ConvModule(
            self.input_channels,
            make_divisible(self.arch_setting[0][0], self.widen_factor),
            3,
            padding=1,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)

    def build_stage_layer(self, stage_idx: int, setting: list) -> list:
        """Build a stage: a stride-2 convolution and a cross-stage partial layer.

        Args:
            stage_idx (int): Index of the stage, from 0.
            setting (list): The stage's row of ``arch_setting``.

        Returns:
            list[nn.Module]: The two layers.
        """
        in_channels, out_channels, mid_channels, block_channels = (
            make_divisible(channels, self.widen_factor) for channels in setting[:4])
        downsample = ConvModule(
            in_channels,
            out_channels,
            3,
            stride=2,
            padding=1,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)
        csp_layer = CSPDarknetLayer(
            out_channels,
            out_channels,
            mid_channels,
            block_channels,
            num_blocks=make_round(setting[4], self.deepen_factor),
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg)
        return [downsample, csp_layer]
