# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Choosing blocks with two processes, which share the batches: what one process chooses."""
import pytest
from block_toys import SHAPE, block_net, make_batches
from ranks import on_ranks

from mmgcp.nn.distributed import rank_share
from mmgcp.pruning import prune

REQUESTS = [dict(remove_blocks=2), dict(remove_blocks=1, block_criterion='taylor'),
            dict(remove_blocks='auto', target_flops=0.6, round_to=2, allocation='uniform')]


def choose(folder=None):
    """The blocks and scores of all requests; a rank has two batches, the other one has one."""
    batches = list(rank_share(make_batches(3)))
    results = [prune(block_net(), batches=batches, input_shape=SHAPE,
                     calibration=[batch.images for batch in batches], **request)
               for request in REQUESTS]
    return [([(block.name, block.score) for block in result.plan.blocks if block.removed],
             [tuple(item.values()) for item in result.depths]) for result in results]


def test_two_processes(tmp_path):
    expected = choose()
    for found in on_ranks(__file__, 'choose', tmp_path):
        for (blocks, depths), (same_blocks, same_depths) in zip(found, expected):
            assert [name for name, _ in blocks] == [name for name, _ in same_blocks]
            for (_, score), (_, same) in zip(blocks, same_blocks):
                assert score == pytest.approx(same, rel=1e-3)
            for (number, loss), (same_number, same_loss) in zip(depths, same_depths):
                assert number == same_number and loss == pytest.approx(same_loss, rel=1e-3)
