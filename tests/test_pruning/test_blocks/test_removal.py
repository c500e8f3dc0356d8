# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from block_toys import SHAPE, block_net, outputs
from pruning_samples import difference

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.temporarily import Snapshot
from mmgcp.pruning.blocks import ScaledShortcut, blocks_off, remove_blocks
from mmgcp.pruning.blocks.removal import remove_blocks_and_verify

ABSENT = {'row.0': None, 'row.1': 'alpha', 'single': None}


def branches_off(model):
    return on_outputs(model, {f'{name}.last': lambda _, output: torch.zeros_like(output)
                              for name in ABSENT})


def test_exact():
    model = block_net().double()
    with branches_off(model):
        expected = outputs(model)
    with blocks_off(model, ABSENT):
        assert difference(expected, outputs(model)) == 0
    assert difference(expected, outputs(model)) > 1e-3
    remove_blocks(model, ABSENT)
    assert difference(expected, outputs(model)) == 0


def test_all_other_keys_keep_their_names():
    model = block_net()
    before = model.state_dict()
    remove_blocks(model, ABSENT)
    gone = tuple(f'{name}.' for name in ABSENT)
    assert list(model.state_dict()) == [key for key in before
                                        if not key.startswith(gone) or key == 'row.1.alpha']
    assert torch.equal(model.row[1].alpha, before['row.1.alpha'])
    assert isinstance(model.row[0], nn.Identity) and isinstance(model.row[1], ScaledShortcut)


def test_modes_are_kept():
    model = block_net()
    model.row[0].train()
    remove_blocks(model, ABSENT)
    assert model.row[0].training and not model.row[1].training


@pytest.mark.parametrize('absent, message', [
    ({'row.0': None, 'row.7': None}, "the detector has no block 'row.7'"),
    ({'row.0': None, '': None}, "the detector has no block ''"),
    ({'row.0': 'alpha'}, "the block 'row.0' has no parameter 'alpha'"),
])
def test_what_is_not_there(absent, message):
    model = block_net()
    before = repr(model)
    with pytest.raises(PruningError, match=message):
        remove_blocks(model, absent)
    assert repr(model) == before


def test_a_snapshot_brings_blocks_back():
    model = block_net()
    blocks, before = [model.row[0], model.row[1]], copy.deepcopy(model)
    snapshot = Snapshot(model)
    remove_blocks(model, ABSENT)
    snapshot.restore()
    assert [model.row[0], model.row[1]] == blocks
    assert list(model.state_dict()) == list(before.state_dict())


def test_a_model_that_computes_something_else_is_restored():
    model = block_net()
    block = model.single
    block.forward = lambda x: 2 * x + block.last(block.first(x))
    remove_blocks_and_verify(model, {'row.0': None}, SHAPE)
    with on_outputs(model, {'row.2': lambda _, output: output + float(
            isinstance(model.single, nn.Identity))}):
        with pytest.raises(PruningError, match='has been restored'):
            remove_blocks_and_verify(model, {'single': None}, SHAPE)
    assert model.single is block
