# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.dist import get_rank
from ranks import on_ranks

from mmgcp.nn.distributed import (
    average_gradients,
    from_first_rank,
    gather_over_ranks,
    in_step,
    numbered,
    rank_share,
    sum_by_name,
    sum_over_ranks,
    total_over_ranks,
)

ITEMS = list('abcde')
NUMBERS = torch.arange(6, dtype=torch.double).view(2, 3)


def calls(folder):
    """Each function once, on rank 0, 1 and 2."""
    rank = get_rank()
    share = list(rank_share(ITEMS))
    params = [torch.zeros(2, requires_grad=True), torch.zeros(1, 3, requires_grad=True),
              torch.zeros(1, requires_grad=True)]
    if rank < 2:  # rank 2 has no batch, and nobody has a gradient of the last parameter
        params[0].grad = torch.full((2, ), 1. + rank)
    if rank == 1:
        params[1].grad = torch.ones(1, 3)
    average_gradients(params, active=rank < 2)
    transposed = (NUMBERS + rank).t()
    return dict(
        share=share, numbered=list(numbered(share)), in_step=list(in_step(share)),
        none=list(in_step([])),
        few=list(in_step(['x'] if rank == 1 else [])),
        sum=sum_over_ranks(transposed), unchanged=torch.equal(transposed, (NUMBERS + rank).t()),
        half=sum_over_ranks(torch.ones(1).half()), total=total_over_ranks(2**40 + rank),
        real=total_over_ranks(0.5), gathered=gather_over_ranks(dict(rank=rank)),
        by_name=sum_by_name({'all': NUMBERS, f'only {rank}': NUMBERS[rank % 2]}),
        first=from_first_rank(f'of {rank}'), gradients=[param.grad for param in params])


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return on_ranks(__file__, 'calls', tmp_path_factory.mktemp('ranks'), 3)


def test_items_are_shared_out(ranks):
    assert [rank['share'] for rank in ranks] == [['a', 'd'], ['b', 'e'], ['c']]
    for rank in ranks:
        assert [(number, ITEMS[number]) for number, _ in rank['numbered']] == rank['numbered']


def test_ranks_take_as_many_steps(ranks):
    assert [rank['in_step'] for rank in ranks] == [['a', 'd'], ['b', 'e'], ['c', None]]
    assert [rank['none'] for rank in ranks] == [[], [], []]
    assert [rank['few'] for rank in ranks] == [[None], ['x'], [None]]


def test_sums(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank['sum'], (3 * NUMBERS + 3).t(), rtol=0, atol=0)
        assert rank['unchanged']
        assert rank['half'].dtype == torch.half and float(rank['half']) == 3
        assert rank['total'] == 3 * 2**40 + 3 and isinstance(rank['total'], int)
        assert rank['real'] == 1.5
        assert list(rank['by_name']) == ['all', 'only 0', 'only 1', 'only 2']
        assert torch.equal(rank['by_name']['all'], 3 * NUMBERS)
        assert torch.equal(rank['by_name']['only 1'], NUMBERS[1])


def test_objects(ranks):
    for rank in ranks:
        assert rank['gathered'] == [dict(rank=0), dict(rank=1), dict(rank=2)]
        assert rank['first'] == 'of 0'


def test_gradients_are_averaged_over_ranks_with_a_batch(ranks):
    for rank in ranks:
        first, second, third = rank['gradients']
        assert torch.equal(first, torch.full((2, ), 1.5))
        assert torch.equal(second, torch.full((1, 3), 0.5))  # no gradient is a gradient of zero
        assert third is None


def test_one_process():
    """Nothing changes, and tensors are not even copied."""
    assert list(rank_share(ITEMS)) == ITEMS
    assert list(numbered(ITEMS)) == list(enumerate(ITEMS))
    assert list(in_step(ITEMS)) == ITEMS
    assert sum_over_ranks(NUMBERS) is NUMBERS
    assert total_over_ranks(3) == 3
    assert sum_by_name(dict(a=NUMBERS))['a'] is NUMBERS
    assert gather_over_ranks('x') == ['x'] and from_first_rank('x') == 'x'
    param = torch.zeros(2, requires_grad=True)
    average_gradients([param], True)
    assert param.grad is None
