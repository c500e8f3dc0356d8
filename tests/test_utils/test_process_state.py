# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmdet.utils import reduce_mean
from mmengine.dist import get_dist_info

from mmgcp.utils.process_state import alone


@pytest.fixture
def group(monkeypatch):
    """As one of two processes, of which the other one does not answer."""
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr('mmengine.dist.utils.get_default_group', lambda: None)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *_: 2)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda *_: 1)


@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_alone(group):
    """MMEngine and MMDetection see no other process, until the block ends or fails."""
    assert get_dist_info() == (1, 2)
    with alone():
        assert get_dist_info() == (0, 1)
        assert reduce_mean(torch.tensor(3.)) == 3
        with alone():
            assert get_dist_info() == (0, 1)
        assert get_dist_info() == (0, 1)
    assert get_dist_info() == (1, 2)
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert get_dist_info() == (1, 2)


def test_alone_without_others():
    with alone():
        assert get_dist_info() == (0, 1)
