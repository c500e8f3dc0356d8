# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every family of detectors: exact, trainable, and rebuilt from its config."""
import copy

import pytest
import torch
import torch.nn as nn
from families import FAMILIES, REPRESENTATIVES, compute_loss, family_config
from layer_kinds import first_part
from mmdet.models.necks.ssd_neck import L2Norm
from pruning_samples import randomise, tensors
from tiers import slow_except

from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning import count_channels
from mmgcp.pruning.detector import make_pruned_config, registered_name
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.remaining import remaining_channels, remaining_units
from mmgcp.pruning.surgery import remove_channels
from mmgcp.utils.config import build_detector, load_config

# What is left alone beside the predictions: the levels that RoIAlign and a flatten read
LEFT_ALONE = {'faster-rcnn-r50': {f'neck.fpn_convs.{level}.conv' for level in range(4)}}


def choose(unit, generator):
    """Random channels of a unit, at most 60 %: whole units, equally many of each block."""
    if unit.conv_groups is not None:
        pieces = [(unit.conv_groups == number).nonzero().flatten()
                  for number in range(int(unit.conv_groups.max()) + 1)]
    elif unit.norm_groups is not None:
        pieces = [torch.arange(int(unit.norm_groups.max()) + 1)]
    else:
        pieces = [torch.arange(unit.size)]
    number = int(torch.randint(0, int(0.6 * len(pieces[0])) + 1, (1, ), generator=generator))
    chosen = torch.cat([piece[torch.randperm(len(piece), generator=generator)[:number]]
                        for piece in pieces])
    if unit.norm_groups is not None:
        chosen = torch.isin(unit.norm_groups, chosen).nonzero().flatten()
    return chosen.sort().values


@torch.no_grad()
def zero(model, units, removed):
    """Zero the channels where they are made and the weights that read them."""
    for unit in units:
        gone = set(removed.get(unit.name, torch.zeros(0)).tolist())
        for item in unit.slices:
            channels = [channel for channel, root in zip(item.channels.tolist(),
                                                         item.unit_index.tolist()) if root in gone]
            owner, _, attribute = item.module.rpartition('.')
            layer = getattr(model.get_submodule(owner), attribute)
            if isinstance(layer, nn.Parameter):
                layer.view(-1)[channels] = 0
            elif item.side == 'out':
                rows = layer.weight
                if isinstance(layer, nn.ConvTranspose2d):
                    rows = rows.transpose(0, 1)
                rows[channels] = 0
                if layer.bias is not None:
                    layer.bias[channels] = 0
            elif getattr(layer, 'groups', 1) > 1:
                inputs, outputs = (count // layer.groups
                                   for count in (layer.in_channels, layer.out_channels))
                for channel in channels:
                    group, index = divmod(channel, inputs)
                    layer.weight[group * outputs:(group + 1) * outputs, index] = 0
            else:
                columns = layer.weight
                if isinstance(layer, nn.ConvTranspose2d):
                    columns = columns.transpose(0, 1)
                columns[:, channels] = 0
    return model


@torch.no_grad()
def outputs(model, size):
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5)).double()
    with eval_mode(model):
        return tensors(run_as_tensors(model, image))


def largest_difference(expected, found):
    """Relative to the largest value of each output."""
    assert [x.shape for x in expected] == [y.shape for y in found]
    return max(float((x - y).abs().max() / (1 + x.abs().max())) for x, y in zip(expected, found))


@pytest.fixture
def l2_norm_in_double(monkeypatch):
    """SSD's normalisation over the channels, which else casts to single precision."""
    monkeypatch.setattr(L2Norm, 'forward', lambda norm, x: norm.weight[None, :, None, None] * x / (
        x.pow(2).sum(1, keepdim=True).sqrt() + norm.eps))


@pytest.mark.parametrize('name', slow_except(REPRESENTATIVES, FAMILIES, pytest.mark.slow))
def test_family(name, tmp_path, l2_norm_in_double):
    size = 320 if name == 'ssd300' else 128
    cfg = family_config(name)
    original = randomise(build_detector(cfg)).double()
    for module in original.modules():
        if isinstance(module, L2Norm):
            nn.init.uniform_(module.weight, 15, 25)  # not initialised when it is built
    units, skipped = find_units(original, (3, size, size))
    assert {layer for layer, reason in skipped.items()
            if reason != 'its outputs are the predictions'} == LEFT_ALONE.get(name, set())

    generator = torch.Generator().manual_seed(1)
    removed = {unit.name: choose(unit, generator) for unit in units}
    pruned, gone = copy.deepcopy(original), first_part(units, removed)
    remove_channels(pruned, units, gone)  # in two goes
    remove_channels(pruned, remaining_units(units, gone), remaining_channels(removed, gone))
    before, after = (sum(param.numel() for param in model.parameters())
                     for model in (original, pruned))
    assert after < 0.8 * before
    expected = outputs(zero(original, units, removed), size)
    assert max(float(x.abs().max()) for x in expected) > 0.01
    found = outputs(pruned, size)
    assert largest_difference(expected, found) < 1e-9

    table = {layer: counts for layer, counts in count_channels(pruned).items()
             if counts != count_channels(original)[layer]}
    detector = registered_name(type(original))
    make_pruned_config(cfg, detector, table).dump(tmp_path / 'pruned.py')
    rebuilt = build_detector(load_config(str(tmp_path / 'pruned.py'))).double()
    assert type(rebuilt) is type(original)
    assert list(rebuilt.state_dict()) == list(original.state_dict())
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    assert largest_difference(found, outputs(rebuilt, size)) == 0
    assert {layer for layer, param in rebuilt.named_parameters() if param.requires_grad} == {
        layer for layer, param in original.named_parameters() if param.requires_grad}

    rebuilt.float()
    if name == 'rtmdet-ins-s':  # MMYOLO 0.6 has no loss for it
        predictions = tensors(rebuilt(torch.rand(2, 3, size, size), mode='tensor'))
        loss = sum(tensor.square().sum() for tensor in predictions)
    else:
        loss = compute_loss(rebuilt, size)
    loss.backward()
    assert torch.isfinite(loss)
    assert [layer for layer, param in rebuilt.named_parameters()
            if param.requires_grad and param.grad is None] == []
