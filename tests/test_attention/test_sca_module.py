# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict

from mmgcp.attention import (
    InsertedAttention,
    SCAModule,
    attention_aside,
    find_attention,
    plain_config,
)
from mmgcp.attention.blocks import find_blocks
from mmgcp.attention.inserted import attention_in_place
from mmgcp.errors import PruningError
from mmgcp.pruning.graph import find_units
from mmgcp.registry import MODELS

EPS = 1e-5


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(generator=generator)
    return module.double()


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(module, x, groups):
    """The attention of a map, computed number by number."""
    params = {name: param.detach().numpy() for name, param in module.named_parameters()}
    x, result = x.numpy(), np.empty(x.shape)
    size = x.shape[1] // groups
    for index, one in enumerate(x):
        for group in range(groups):
            part = one[group * size:(group + 1) * size]
            scales = np.array([[max(part[:, row, column]) + sum(part[:, row, column]) / size
                                for column in range(x.shape[3])] for row in range(x.shape[2])])
            scales = (scales - scales.mean()) / np.sqrt(scales.var() + EPS)
            part = part * sigmoid(scales * params['spatial.norm.weight'][group]
                                  + params['spatial.norm.bias'][group])
            means, tops = part.mean((1, 2)), part.max((1, 2))
            for channel in range(size):
                number, total = group * size + channel, 0.
                for name, values in (('mean', means), ('max', tops)):
                    value = (values[channel] - values.mean()) / np.sqrt(values.var() + EPS)
                    total += (value * params[f'channel.{name}_norm.weight'][number]
                              + params[f'channel.{name}_norm.bias'][number])
                result[index, number] = part[channel] * sigmoid(total)
    return result


@pytest.mark.parametrize('channels, groups', [(8, 2), (6, 3), (5, 1)])
def test_forward(channels, groups):
    module = randomise(SCAModule(channels, groups))
    x = image(2, channels, 4, 3)
    np.testing.assert_allclose(module(x).detach().numpy(), by_hand(module, x, groups), atol=1e-12)


@pytest.mark.parametrize('channels, wanted, groups', [
    (64, 8, 8), (8, 8, 4), (12, 8, 6), (37, 8, 1), (35, 8, 7), (1, 8, 1), (2, 8, 1), (4, 1, 1)])
def test_number_of_groups(channels, wanted, groups):
    """The largest that fits, with at least two channels in each group."""
    assert SCAModule(channels, wanted).spatial.groups == groups


@pytest.mark.parametrize('scale', [0.9, 0.25])
def test_starts_as_a_constant_factor(scale):
    x = image(2, 6, 3, 3)
    module = SCAModule(6, initial_scale=scale).double()
    assert torch.allclose(module(x), scale * x)
    assert torch.allclose(module.channel(x), torch.full((2, 6), scale**0.5, dtype=x.dtype))
    module(x).square().sum().backward()
    assert all(param.grad.abs().sum() > 0 for param in module.parameters())


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (1, 4, 1, 1), (2, 1, 3, 3)])
def test_maps_of_a_single_value(shape):
    """Their standardised values are zero, so that only the biases matter."""
    module, x = randomise(SCAModule(shape[1])), image(*shape)
    assert module.train()(x).isfinite().all() and module.eval()(x).isfinite().all()


def test_precision():
    x = image(1, 4, 2, 2).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert SCAModule(4)(x).dtype == torch.bfloat16


@pytest.mark.parametrize('settings, message', [
    (dict(initial_scale=1.), r'initial_scale must be a number in \(0, 1\)'),
    (dict(initial_scale=0), 'initial_scale must be'), (dict(num_groups=0), 'from 1 to 4096')])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SCAModule(8, **settings)


class Net(nn.Module):
    """Blocks of several kinds, one of them a gate and one depthwise."""

    def __init__(self):
        super().__init__()
        options = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU'))
        self.stem = ConvModule(3, 8, 3, 2, 1, **options)
        self.depth = ConvModule(8, 8, 3, 1, 1, groups=8, **options)
        self.conv, self.norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.bare, self.gate = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)
        self.pred = nn.Conv2d(4, 2, 1)

    def forward(self, x, mode='tensor'):
        x = self.norm(self.conv(self.depth(self.stem(x)))).relu()
        x = self.bare(x)
        return self.pred(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def with_attention(net):
    producers = find_blocks(net)
    channels = dict(stem=8, norm=6, bare=4)
    attention = InsertedAttention(producers, channels, 2)
    attention.insert(net)
    randomise(net.sca).float()
    return net


X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_blocks(net):
    """Behind normalisation and activation where possible, and only where there is a map."""
    assert find_blocks(net) == dict(stem='stem.conv', norm='conv', bare='bare')
    assert find_blocks(net, ['stem', 'b*']) == dict(stem='stem.conv', bare='bare')
    with pytest.raises(PruningError, match="pattern 'steam'"):
        find_blocks(net, ['steam'])
    with pytest.raises(PruningError, match='no prunable convolution'):
        find_blocks(net, 'gate')


def test_convolution_shared_by_blocks():
    class Shared(nn.Module):

        def __init__(self):
            super().__init__()
            self.levels = nn.ModuleList(
                ConvModule(3, 6, 3, padding=1, norm_cfg=dict(type='BN')) for _ in range(2))
            self.levels[1].conv = self.levels[0].conv
            self.pred = nn.Conv2d(6, 2, 1)

        def forward(self, x, mode='tensor'):
            return [self.pred(level(part))
                    for level, part in zip(self.levels, (x, x[:, :, ::2, ::2]))]

    assert find_blocks(Shared()) == {
        'levels.0': 'levels.0.conv', 'levels.1': 'levels.0.conv'}


def test_attention_scales_what_blocks_return(net):
    plain, net = copy.deepcopy(net), with_attention(net)
    assert list(net.sca) == ['stem', 'norm', 'bare']
    x = plain.conv(plain.depth(net.sca['stem'](plain.stem(X))))
    x = net.sca['bare'](plain.bare(net.sca['norm'](plain.norm(x)).relu()))
    expected = plain.pred(x * plain.gate(x.mean((2, 3), keepdim=True)).sigmoid())
    assert torch.allclose(net(X), expected, atol=1e-6)
    assert not torch.allclose(plain(X), expected, atol=1e-2)


@pytest.mark.parametrize('duplicate', [copy.deepcopy,
                                       lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_attention_of_their_own(net, duplicate):
    net = with_attention(net)
    before = net(X)
    twin = duplicate(net)
    assert torch.equal(twin(X), before)
    with torch.no_grad():
        twin.sca['stem'].channel.mean_norm.bias -= 5
    assert torch.equal(net(X), before) and not torch.allclose(twin(X), before)
    twin.sca.take_out(twin)
    assert torch.equal(net(X), before)


def test_replaced_block(net):
    """The new block gets the attention, for example where BatchNorm is converted."""
    net = with_attention(net)
    before = net(X)
    norm = nn.BatchNorm2d(6).eval()
    norm.load_state_dict(net.norm.state_dict())
    net.norm = norm
    assert torch.allclose(net(X), before) and torch.allclose(net(X), before)


def test_taken_out_for_a_while(net):
    plain, net = copy.deepcopy(net), with_attention(net)
    before, order, attributes = net(X), list(net.state_dict()), set(vars(net))
    with attention_aside(net, put_back=True):
        assert torch.equal(net(X), plain(X)) and list(net.state_dict()) == list(plain.state_dict())
        assert find_blocks(net) == find_blocks(plain)
    assert torch.equal(net(X), before) and list(net.state_dict()) == order
    assert set(vars(net)) == attributes
    with attention_aside(plain):
        assert find_attention(plain) is None


def test_set_aside_and_dropped(net):
    plain, net = copy.deepcopy(net), with_attention(net)
    before, attention = net(X), net.sca
    assert find_attention(net) is attention and attention.is_in(net)
    with attention_aside(net):
        assert find_attention(net) is attention and not attention.is_in(net)
        assert torch.equal(net(X), plain(X))
        assert [name for name, _ in net.named_modules()] == [
            name for name, _ in plain.named_modules()]
        with attention_in_place(net):
            assert torch.equal(net(X), before) and attention.is_in(net)
        assert torch.equal(net(X), plain(X))
        with attention_aside(net):  # it is aside already
            assert find_attention(net) is attention
        assert find_attention(net) is attention
    assert torch.equal(net(X), plain(X)) and find_attention(net) is None
    assert set(vars(net)) == set(vars(plain))


def test_put_back_after_an_error(net):
    """With everything that has been replaced meanwhile."""
    net = with_attention(net)
    before, attributes = net(X), set(vars(net))
    with pytest.raises(KeyError), attention_aside(net):
        net.stem.conv.weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
        raise KeyError
    assert torch.equal(net(X), before) and set(vars(net)) == attributes


def test_structure_is_not_looked_at_with_attention(net):
    with pytest.raises(PruningError, match=r'sca \(InsertedAttention\) is only for training and '
                                           r'has to be taken out .*attention_aside\(model\)'):
        find_units(with_attention(net))


def test_config_without_attention():
    plain = dict(type='YOLODetector', backbone=dict(type='x'))
    config = dict(plain, type='mmgcp.SCADetector', detector_type='YOLODetector',
                  attention=dict(num_groups=4))
    cfg = Config(dict(model=config, load_from='x'))
    before = copy.deepcopy(cfg.to_dict())
    assert plain_config(cfg).to_dict() == dict(model=plain, load_from='x')
    assert cfg.to_dict() == before
    cfg = Config(dict(model=plain))
    assert plain_config(cfg) is cfg
    with pytest.raises(PruningError, match="attention has an unknown option 'groups'"):
        MODELS.build(ConfigDict(config, attention=dict(groups=4)))
