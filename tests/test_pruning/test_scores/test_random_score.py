# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch
import torch.nn as nn

from mmgcp.pruning import ChannelUnit
from mmgcp.pruning.scores import Random
from mmgcp.registry import TASK_UTILS

MODEL = nn.Identity()


def scores(seed, name, size):
    scores = Random(seed)(MODEL, ChannelUnit(name, size, ()))
    assert list(scores) == [name]
    return scores[name]


def test_uniform():
    values = scores(0, 'layer', 20000)
    assert values.shape == (20000, ) and 0 <= values.min() and values.max() < 1
    counts = torch.histc(values, 10, 0, 1)
    assert (counts - 2000).abs().max() < 200  # more than four standard deviations


def test_depends_on_seed_and_set_alone():
    first = scores(0, 'layer', 50)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, scores(0, 'layer', 50))
    assert torch.equal(state, torch.get_rng_state())
    for other in (scores(1, 'layer', 50), scores(0, 'other', 50)):
        assert (first - other).abs().mean() > 0.15


def test_is_registered():
    criterion = TASK_UTILS.build(dict(type='mmgcp.Random', seed=3))
    unit = ChannelUnit('layer', 9, ())
    assert torch.equal(criterion(MODEL, unit)['layer'], scores(3, 'layer', 9))
    assert criterion.needs is None
