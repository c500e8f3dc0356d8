# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings

import pytest
import torch
from faults import root_only, small_disk

from mmgcp.pruning.resume import Unfinished


def begin(path, digest, value):
    """Load the state of a request, if there is one, and save another one."""
    unfinished = Unfinished(path, digest)
    state = unfinished.load()
    unfinished.save(value=value)
    return state and state['value']


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_states_of_several_requests(tmp_path):
    """None is lost when another request comes in between, and each is told where its state is."""
    path = tmp_path / 'unfinished.pth'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert begin(path, 'a', 1) is None
        assert begin(path, 'a', 2) == 1
    with pytest.warns(UserWarning, match='another request, .* kept as unfinished-other-1.pth'):
        assert begin(path, 'b', 10) is None
    assert names(tmp_path) == ['unfinished-other-1.pth', 'unfinished.pth']
    with pytest.warns(UserWarning, match='kept as unfinished-other-2.pth'):
        assert begin(path, 'c', 100) is None
    with pytest.warns(UserWarning, match='kept as unfinished-other-3.pth'):
        assert begin(path, 'a', 3) == 2
    path.unlink()  # the request was finished
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert begin(path, 'c', 101) == 100
        assert begin(path, 'c', 102) == 101
    with pytest.warns(UserWarning, match='kept as unfinished-other-1.pth'):
        assert begin(path, 'b', 11) == 10
    assert names(tmp_path) == ['unfinished-other-1.pth', 'unfinished.pth']


def test_nothing_is_kept_without_a_file(tmp_path):
    assert begin(None, 'a', 1) is None
    assert not names(tmp_path)


@root_only
def test_full_disk(tmp_path):
    """The last state that fitted stays."""
    with small_disk(tmp_path / 'disk', 'size=64k') as disk:
        path = disk / 'deep' / 'unfinished.pth'
        assert begin(path, 'a', 1) is None
        with pytest.raises(OSError, match='No space left'):
            Unfinished(path, 'a').save(value=torch.zeros(1 << 18))
        assert names(path.parent) == ['unfinished.pth']
        assert begin(path, 'a', 2) == 1
