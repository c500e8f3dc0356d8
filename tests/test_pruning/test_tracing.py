# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from mmyolo.models.layers import CSPLayerWithTwoConv

from mmgcp.nn.forward import flatten_tensors
from mmgcp.pruning.tracing import Observer, from_front, splits_rightly, traceable


class Watched(nn.Module):
    """A function of one feature map (1, 4, 6, 6) with gradients."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def watch(function):
    """Run a function of a feature map (1, 4, 6, 6) and of an image, and observe it."""
    model = Watched(lambda x: function(x, torch.rand(1, 4, 6, 6)))
    observer = Observer(model)
    with observer:
        output = model(torch.rand(1, 4, 6, 6, requires_grad=True) * 2)
    return observer, output


def test_traceable_modes():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.InstanceNorm2d(1),
                          nn.Dropout(0.5)).eval()
    model[0].weight.requires_grad_(False)
    model[3].train()
    with traceable(model):
        assert [module.training for module in model] == [True, False, False, False]
        assert all(param.requires_grad for param in model.parameters())
    assert [module.training for module in model] == [False, False, False, True]
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad


def test_traceable_restores_after_an_error():
    model = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    model[0].weight.requires_grad_(False)
    with pytest.raises(KeyError), traceable(model):
        raise KeyError
    assert not model.training and not model[0].weight.requires_grad


def test_flatten_tensors():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = flatten_tensors([a, {'x': (b, None), 'y': c}, 'text'])
    assert [id(item) for item in found] == [id(a), id(b), id(c)]


@pytest.mark.parametrize('split', [
    lambda x: x.split((1, 3), 1), lambda x: torch.split(x, (1, 3), dim=1),
    lambda x: torch.split(tensor=x, split_size_or_sections=(1, 3), dim=1),
    lambda x: torch.tensor_split(x, (1, ), dim=1), lambda x: x.tensor_split((1, ), -3),
    lambda x: (*torch.chunk(x, 4, 1)[:1], *torch.chunk(x[:, 1:], 1, 1))])
def test_splits_are_slices(split):
    """Torch-Pruning follows these."""
    _, (first, rest) = watch(lambda x, _: split(x))
    assert first.shape == (1, 1, 6, 6) and rest.shape == (1, 3, 6, 6)
    assert type(first.grad_fn).__name__ == 'SliceBackward0'
    image = torch.rand(1, 4, 6, 6)
    assert torch.equal(torch.cat(Watched(split)(image), 1), image)


def test_slices_have_the_right_values():
    model = Watched(lambda x: x.split((1, 2, 1), 1))
    image = torch.rand(1, 4, 2, 2, requires_grad=True)
    with Observer(model):
        pieces = model(image)
    for piece, expected in zip(pieces, (image[:, :1], image[:, 1:3], image[:, 3:])):
        assert torch.equal(piece, expected)


def test_unsplit_maps_and_other_dimensions():
    _, (whole, ) = watch(lambda x, _: x.split(4, 1))
    assert whole.shape == (1, 4, 6, 6)
    maps = []
    _, (left, right) = watch(lambda x, _: (maps.append(x), x.chunk(2, 3))[1])
    assert torch.equal(left, maps[0][..., :3]) and torch.equal(right, maps[0][..., 3:])


def test_hooks_are_removed():
    model = nn.Sequential(Watched(lambda x: x + 1), nn.ReLU())

    def hooks():
        return [module for module in model.modules()
                if module._forward_hooks or module._forward_pre_hooks]

    with Observer(model):
        model(torch.ones(1))
        assert len(hooks()) == 3
    assert not hooks()
    with pytest.raises(ZeroDivisionError), Observer(model):
        raise ZeroDivisionError
    assert not hooks()


def test_who_splits():
    layer = CSPLayerWithTwoConv(4, 4)
    model = nn.Sequential(layer, Watched(lambda x: x[:, :2]))
    observer = Observer(model)
    with observer:
        output = model(torch.rand(1, 4, 6, 6))
    assert observer.splits[output.grad_fn] is Watched
    assert list(observer.splits.values()).count(CSPLayerWithTwoConv) == 2
    assert len(observer.splits) == 3


def test_who_splits_rightly():
    class Derived(CSPLayerWithTwoConv):
        pass

    assert splits_rightly(CSPLayerWithTwoConv) and splits_rightly(Derived)
    assert not splits_rightly(nn.Module) and not splits_rightly(None)


@pytest.mark.parametrize('function, constant', [
    (lambda x, image: x + image, True),
    (lambda x, image: image - x, True),
    (lambda x, image: x.add_(image), True),
    (lambda x, image: torch.mul(x, other=image), True),
    (lambda x, image: x / image[0], True),
    (lambda x, image: torch.minimum(image, x), True),
    (lambda x, image: torch.where(image > 0.5, x, image), True),
    (lambda x, image: torch.addcmul(x, image, x), True),
    (lambda x, image: torch.cat((x, image), 1), True),
    (lambda x, image: torch.cat((x, image[:, :1]), 1), True),
    (lambda x, image: x * x.detach(), True),
    (lambda x, image: x.mean((2, 3)) + torch.ones(4), True),
    (lambda x, image: x + x, False),
    (lambda x, image: x + 1, False),
    (lambda x, image: 3 - x, False),
    (lambda x, image: x * torch.tensor(2.), False),
    (lambda x, image: x * torch.ones(6), False),  # for each column
    (lambda x, image: x * image[:, :1], False),
    (lambda x, image: torch.where(x > 0.5, x, -x), False),
    (lambda x, image: torch.cat((x, x), 1), False),
    (lambda x, image: nn.functional.batch_norm(x.mean((2, 3)), torch.ones(4), torch.ones(4)),
     False)], ids=range(21))
def test_constants(function, constant):
    observer, output = watch(function)
    assert (output.grad_fn in observer.with_constants) == constant


def test_parameters_are_no_constants():
    model = Watched(lambda x: x * model.scale + model.shift)
    model.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
    model.shift = nn.Parameter(torch.ones(4, 1, 1))
    observer = Observer(model)
    with observer:
        model(torch.rand(1, 4, 6, 6, requires_grad=True))
    assert not observer.with_constants


@pytest.mark.parametrize('function, mixing', [
    (lambda x: x.flip(1), True), (lambda x: x.flip(3), False), (lambda x: x.flip(-1), False),
    (lambda x: x.roll(1, -3), True), (lambda x: x.roll(1, 2), False),
    (lambda x: x[:, [3, 0, 1, 2]], True), (lambda x: x[[0]], False),
    (lambda x: x[:, 0], True), (lambda x: x[..., 0], False), (lambda x: x[0], False),
    (lambda x: x.unbind(1)[0], True), (lambda x: x.index_select(1, torch.tensor([0])), True),
    (lambda x: x.gather(-3, torch.zeros(1, 4, 6, 6).long()), True),
    (lambda x: x.mean(1), True), (lambda x: x.mean((2, 3)), False), (lambda x: x.sum(1), False),
    (lambda x: x.amax(-3), True), (lambda x: x.max(1)[0], True), (lambda x: x.max(), False),
    (lambda x: x.softmax(1), True), (lambda x: x.softmax(-1), False),
    (lambda x: x.cumsum(1), True), (lambda x: x.std(1), True),
    (lambda x: x.norm(dim=1), False), (lambda x: x.unsqueeze(1), False),
    (lambda x: torch.stack((x, x), 1), False), (lambda x: torch.cat((x, x), 1), False),
    (lambda x: x.permute(0, 2, 1, 3), False),
    (lambda x: nn.functional.channel_shuffle(x, 2), True),
    (lambda x: nn.functional.group_norm(x, 2), True),
    (lambda x: nn.functional.layer_norm(x, (4, 6, 6)), True),
    (lambda x: x.view(1, 2, 2, 6, 6), True), (lambda x: x.reshape(1, 24, 6), True),
    (lambda x: x.view(1, 4, 36), False), (lambda x: x.flatten(1), False),
    (lambda x: x.mean(-1).mean(-1).contiguous(), False),
    (lambda x: x.relu(), False), (lambda x: 2 * x, False)], ids=range(38))
def test_mixing(function, mixing):
    observer, output = watch(lambda x, _: function(x))
    assert (output.grad_fn in observer.mixing) == mixing


def test_concatenated_channels():
    observer, output = watch(lambda x, _: torch.cat((torch.cat((x, x), 1), x), dim=-3))
    assert observer.concatenated[output.grad_fn] == 12
    assert sorted(observer.concatenated.values()) == [8, 12]
    observer, output = watch(lambda x, _: torch.cat((x, x), 2))
    assert observer.concatenated[output.grad_fn] == 4


def test_dimensions_from_front():
    assert [from_front(dim, 4) for dim in (0, 3, 2**64 - 1, 2**64 - 4)] == [0, 3, 3, 0]
