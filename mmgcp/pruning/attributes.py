# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Attributes of modules that repeat channel counts, and how to correct them after pruning."""
from typing import Callable, Dict, Set, Type

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from mmyolo.models.layers import CSPLayerWithTwoConv, RepVGGBlock
from torch import Tensor

# Type of module -> function that corrects the attributes of a module
ATTRIBUTE_RULES: Dict[Type[nn.Module], Callable[[nn.Module], None]] = {}
# Types that split channels in forward() according to attributes that such a function corrects
SPLITTING_TYPES: Set[Type[nn.Module]] = set()


def refresh_attributes(model: nn.Module) -> None:
    """Correct the attributes of all modules of a model whose layers have lost channels."""
    for module in model.modules():
        rules = [rule for kind, rule in ATTRIBUTE_RULES.items() if isinstance(module, kind)]
        for rule in rules or [_refresh_branches]:
            rule(module)


def register_attribute_rule(kind: Type[nn.Module], splits: bool = False) -> Callable:
    """Register a function that corrects the attributes of modules of a type.

    It is called with the module after channels have been removed from its layers, and when a
    pruned detector is built from its config.

    Args:
        kind (type): The type, including its subclasses.
        splits (bool): Whether ``forward`` splits the channels of a feature map, and does so
            correctly once the attributes are corrected. Channels that are split by other
            modules are not pruned. Defaults to False.

    Returns:
        Callable: A decorator for the function, which gets the module.
    """
    def register(rule: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        ATTRIBUTE_RULES[kind] = rule
        if splits:
            SPLITTING_TYPES.add(kind)
        return rule
    return register


def _refresh_branches(block: nn.Module) -> None:
    """Correct the counts of any block whose branches, as in RepVGG, become one for deployment.

    ``switch_to_deploy`` builds its convolution from them. The first convolution that a
    BatchNorm follows is that of a branch, as each reads the input and emits the output.
    """
    if not (hasattr(block, 'switch_to_deploy') and isinstance(
            getattr(block, 'in_channels', None), int) and isinstance(
            getattr(block, 'out_channels', None), int)):
        return
    if sum(hasattr(part, 'switch_to_deploy') for part in block.modules()) > 1:
        return  # it contains such blocks
    for part in block.modules():
        layers = list(part.children())
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        if convs and any(isinstance(layer, _BatchNorm) for layer in layers):
            block.in_channels, block.out_channels = convs[0].in_channels, convs[0].out_channels
            if hasattr(block, 'groups'):
                block.groups = convs[0].groups
            return


@register_attribute_rule(RepVGGBlock)
def _refresh_rep_vgg(block: RepVGGBlock) -> None:
    """``switch_to_deploy`` builds its convolution from these counts."""
    conv = block.rbr_reparam if hasattr(block, 'rbr_reparam') else block.rbr_dense.conv
    block.in_channels, block.out_channels, block.groups = (
        conv.in_channels, conv.out_channels, conv.groups)
    block.__dict__.pop('id_tensor', None)  # a cache for the number of channels before


class UnequalCSPLayerWithTwoConv(CSPLayerWithTwoConv):
    """YOLOv8's CSP layer, which splits off the channels that its blocks read, not just half."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute a feature map (N, C', H, W) from a feature map (N, C, H, W)."""
        x = self.main_conv(x)
        parts = [x[:, :self.mid_channels], x[:, self.mid_channels:]]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.final_conv(torch.cat(parts, 1))


@register_attribute_rule(CSPLayerWithTwoConv, splits=True)
def _refresh_csp_layer(layer: CSPLayerWithTwoConv) -> None:
    """The first part has the channels that the blocks do not read.

    What is left of a removed block has no layers and emits what it reads.
    """
    outputs, blocks = layer.main_conv.conv.out_channels, list(layer.blocks)
    first = next((block.conv1.conv for block in blocks if hasattr(block, 'conv1')), None)
    if first is None:
        read = (layer.final_conv.conv.in_channels - outputs) // len(blocks)
    else:
        read = first.in_channels
    layer.mid_channels = outputs - read
    if 2 * layer.mid_channels != outputs:
        layer.__class__ = UnequalCSPLayerWithTwoConv
