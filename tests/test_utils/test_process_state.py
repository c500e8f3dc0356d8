# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import sys
import warnings

import pytest
import torch
from mmdet.utils import reduce_mean
from mmengine.dist import get_dist_info
from mmengine.logging import MMLogger

from mmgcp.utils.process_state import alone, silence


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


@pytest.mark.parametrize('with_warnings', [False, True])
def test_silence(monkeypatch, capsys, with_warnings):
    """Warnings pass unless they are meant as well; all is as before, also after an error."""
    monkeypatch.setattr(MMLogger, '_instance_dict', {})
    logger = MMLogger.get_instance('silent')
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with silence(with_warnings):
            print('printed')
            print('complained', file=sys.stderr)
            logger.info('informed')
            logger.warning('logged')
            warnings.warn('warned', stacklevel=1)
            raise ZeroDivisionError
    out, err = capsys.readouterr()
    assert 'printed' not in out and 'informed' not in out
    found = 'complained' in err, 'logged' in out, len(caught) == 1
    assert found == (not with_warnings, ) * 3
    print('printed')
    logger.info('informed')
    out = capsys.readouterr().out
    assert 'printed' in out and 'informed' in out
