# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from block_toys import SHAPE, BlockNet, Shortcut, block_net
from pruning_samples import Block, randomise

from mmgcp.pruning.blocks import Block as Found
from mmgcp.pruning.blocks import find_blocks


def found_in(model):
    return {block.name: block for block in find_blocks(model, SHAPE).found}


def test_blocks_are_found_by_what_they_compute():
    model = block_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert find_blocks(model, SHAPE).found == [
        Found('stem.1', 'plain'),
        Found('row.0', 'residual', 'last'),
        Found('row.1', 'residual', 'last', 'alpha'),
        Found('row.2', 'residual', 'last'),
        Found('single', 'residual', 'last')]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


def test_what_looks_like_a_block_is_listed_with_its_reason():
    skipped = find_blocks(block_net(), SHAPE).skipped
    assert skipped['stem.0'] == 'it turns 3x16x16 into 8x16x16 (channels, height, width)'
    assert skipped['twice'] == 'it runs 2 times for an image'
    assert 'down' not in skipped  # stands in no row
    model = block_net()
    model.gated = Shortcut(6)
    model.gated.forward = lambda x, gate: x + gate * model.gated.last(model.gated.first(x))
    assert find_blocks(model, SHAPE).skipped['gated'] == 'it reads more than one feature map'


def test_a_scale_that_happens_to_be_one_is_a_scale():
    model = block_net()
    with torch.no_grad():
        model.row[1].alpha.fill_(1)
    assert found_in(model)['row.1'].scale == 'alpha'
    assert float(model.row[1].alpha) == 1.


def test_a_parameter_that_scales_the_branch_is_none():
    model = block_net()
    model.single.gain = nn.Parameter(torch.ones(1))
    block = model.single
    block.forward = lambda x: x + block.gain * block.last(block.first(x))
    assert found_in(model)['single'] == Found('single', 'residual', 'last')


def test_the_innermost_of_nested_blocks():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(Shortcut(8), Block(8, 8))

        def forward(self, x):
            return x + self.inside(x)

    model = block_net()
    model.row[0] = randomise(Outer()).eval()
    names = set(found_in(model))
    assert 'row.0.inside.0' in names and 'row.0' not in names


@pytest.mark.parametrize('share', ['layer', 'parameter'])
def test_a_block_that_shares_layers_stays(share):
    model = block_net()
    if share == 'layer':
        model.row[0].first = model.row[2].first
    else:
        model.row[0].first.conv.weight = model.row[2].first.conv.weight
    blocks = find_blocks(model, SHAPE)
    assert not {'row.0', 'row.2'} & {block.name for block in blocks.found}
    assert blocks.skipped['row.2'].startswith('it shares layers with row.0.first')


def test_a_block_whose_removal_breaks_the_detector_stays():
    class Reading(BlockNet):
        def forward(self, x, mode='tensor'):
            return super().forward(x) * self.single.first.conv.weight.mean()

    blocks = find_blocks(randomise(Reading()).eval(), SHAPE)
    assert [block.name for block in blocks.found if block.kind == 'residual'] == [
        'row.0', 'row.1', 'row.2']
    assert blocks.skipped['single'].startswith('it cannot be removed: the model then does not run')
