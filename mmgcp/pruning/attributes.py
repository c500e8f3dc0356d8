# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Attributes of modules that repeat channel counts and that their methods read."""
from typing import Callable, Dict, Set, Type

import torch
import torch.nn as nn
from mmyolo.models.layers import CSPLayerWithTwoConv, RepVGGBlock
from torch import Tensor

# Type of a module -> function that corrects the attributes of one
ATTRIBUTE_RULES: Dict[Type[nn.Module], Callable[[nn.Module], None]] = {}
# Types whose forwards split channels where their corrected attributes say
SPLITTING_TYPES: Set[Type[nn.Module]] = set()


def refresh_attributes(model: nn.Module) -> None:
    """Make the attributes of modules agree with the channels of their layers.

    Args:
        model (nn.Module): A model whose layers have been reduced, changed in place.
    """
    for module in model.modules():
        for kind, rule in ATTRIBUTE_RULES.items():
            if isinstance(module, kind):
                rule(module)


def register_attribute_rule(kind: Type[nn.Module], splits: bool = False) -> Callable:
    """Register a function that corrects the attributes of modules of a type.

    It is called with the module after its layers have been reduced, also where a
    pruned detector is built from its config.

    Args:
        kind (type): The type; its subclasses are meant too.
        splits (bool): Whether its forward splits a feature map into channels and does so
            rightly after the correction. Channels that other modules split are not pruned.
            Defaults to False.

    Returns:
        Callable: The decorator.
    """
    def register(rule: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        ATTRIBUTE_RULES[kind] = rule
        if splits:
            SPLITTING_TYPES.add(kind)
        return rule
    return register


@register_attribute_rule(RepVGGBlock)
def _refresh_rep_vgg(block: RepVGGBlock) -> None:
    """``switch_to_deploy`` makes its convolution from these."""
    conv = block.rbr_reparam if hasattr(block, 'rbr_reparam') else block.rbr_dense.conv
    block.in_channels, block.out_channels, block.groups = (
        conv.in_channels, conv.out_channels, conv.groups)
    block.__dict__.pop('id_tensor', None)  # made for as many channels as there were


class UnequalCSPLayerWithTwoConv(CSPLayerWithTwoConv):
    """YOLOv8's CSP layer, split where the second part has what the blocks read.

    The original splits into equal halves.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Process a feature map (N, C, H, W)."""
        x = self.main_conv(x)
        parts = [x[:, :self.mid_channels], x[:, self.mid_channels:]]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.final_conv(torch.cat(parts, 1))


@register_attribute_rule(CSPLayerWithTwoConv, splits=True)
def _refresh_csp_layer(layer: CSPLayerWithTwoConv) -> None:
    """The first part has what the blocks do not read."""
    outputs = layer.main_conv.conv.out_channels
    layer.mid_channels = outputs - layer.blocks[0].conv1.conv.in_channels
    if 2 * layer.mid_channels != outputs:
        layer.__class__ = UnequalCSPLayerWithTwoConv
