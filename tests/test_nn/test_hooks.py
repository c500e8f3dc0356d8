# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.nn.hooks import hooked, maker_of, set_maker


def test_hooks_are_removed_also_after_an_error():
    layer, seen = nn.Identity(), []
    with pytest.raises(ValueError):
        with hooked([layer.register_forward_pre_hook(lambda *_: seen.append(0)),
                     layer.register_forward_hook(lambda *_: seen.append(1))]):
            layer(torch.zeros(1))
            raise ValueError
    layer(torch.zeros(1))
    assert seen == [0, 1]


def test_the_maker_of_a_tensor_is_forgotten_when_it_changes():
    tensor = torch.zeros(2)
    assert maker_of(tensor) is None
    set_maker(tensor, 'layer')
    assert maker_of(tensor) == 'layer'
    assert maker_of(tensor * 2) is None
    tensor.add_(1)
    assert maker_of(tensor) is None
