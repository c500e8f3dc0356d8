# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is computed once of each batch while kernels are fitted, and that it changes nothing."""
import copy
import dataclasses

import pytest
import torch
from auxiliary_toys import SIZE, TinyDetector, begun, make_batches, tiny_detector, total_loss
from pruning_samples import Block, randomise

from mmgcp.nn.temporarily import requiring_grad
from mmgcp.pruning import prune
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layerwise import DCP, LCP
from mmgcp.pruning.layerwise.auxiliary.attached import watch_consumers
from mmgcp.pruning.layerwise.auxiliary.reconstructor import Reconstructor
from mmgcp.pruning.layerwise.auxiliary.settings import AuxiliarySettings
from mmgcp.pruning.surgery import channels_off

ENOUGH, SOME, NOTHING = 2**28, 2 * SIZE**2 * 4 * 6, 0


class ResidualDetector(TinyDetector):
    """A unit has two consumers, one of which reads what the other one computes."""

    def __init__(self):
        super().__init__()
        self.more = Block(8, 8, 3)

    def extract_feat(self, images):
        feature, = super().extract_feat(images)
        return [feature + self.more(feature)]


def make_reconstructor(model, **settings):
    """A reconstructor of a model, its units by name, and a batch."""
    units = {unit.name: unit for unit in find_units(model, (3, SIZE, SIZE))[0]}
    batch, = make_batches(1)
    calls = watch_consumers(model, list(units.values()), batch.images)
    return Reconstructor.of(model, calls, AuxiliarySettings(**settings)), units, batch


def look(reconstructor, model, unit, batch):
    kernels = [model.get_submodule(name).weight for name in reconstructor.consumers(model, unit)]
    with requiring_grad(model, kernels):
        view, = reconstructor.views(model, unit, [batch], lambda *_: 'targets')
    return view


def test_views():
    """They have the consumers' inputs in the model as it is and outputs in the original one."""
    model, _ = tiny_detector()
    reconstructor, units, batch = make_reconstructor(model)
    with torch.no_grad():
        expected = model.body.conv(model.stem(batch.images))
        model.stem.conv.weight.mul_(1.1)
        model.body.conv.weight.mul_(1.2)
        removed = torch.tensor([1, 3])
        wanted = model.stem(batch.images).index_fill(1, removed, 0)
        with channels_off(model, [units['stem.conv']], {'stem.conv': removed}):
            view = look(reconstructor, model, units['stem.conv'], batch)
            outputs = reconstructor.outputs(model, view)
        assert torch.allclose(outputs['body.conv'][0], model.body.conv(wanted), atol=1e-5)
    assert list(view.inputs) == list(view.expected) == ['body.conv'] and view.images is None
    assert torch.allclose(view.inputs['body.conv'][0], wanted)
    assert torch.allclose(view.expected['body.conv'][0], expected)
    assert view.targets == 'targets' and view.size == (6 + 8) * 2 * 16**2 * 4
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


def test_inputs_that_depend_on_the_kernels_are_not_kept():
    model = randomise(ResidualDetector()).eval()
    reconstructor, units, batch = make_reconstructor(model)
    view = look(reconstructor, model, units['body.conv'], batch)
    assert view.inputs is None and view.images is batch.images
    with torch.no_grad():
        model.more.conv.weight.mul_(2)
        outputs = reconstructor.outputs(model, view)
        expected = model(batch.images)
    assert set(outputs) == {'more.conv', 'pred'}
    assert torch.allclose(outputs['pred'][0], expected, atol=1e-5)
    assert not torch.allclose(view.expected['pred'][0], expected, atol=1e-2)


@pytest.mark.parametrize('mib, kept', [(1., True), (0., False)])
def test_views_are_kept_if_they_fit(mib, kept):
    model, _ = tiny_detector()
    reconstructor, units, batch = make_reconstructor(model, cache_mib=mib)
    view = look(reconstructor, model, units['stem.conv'], batch)
    assert (look(reconstructor, model, units['stem.conv'], batch) is view) == kept
    assert look(reconstructor, model, units['body.conv'], batch) is not view
    reconstructor.forget()
    assert look(reconstructor, model, units['stem.conv'], batch) is not view


@pytest.mark.parametrize('kind', [LCP, DCP])
def test_each_unit_is_scored_on_the_model_as_it_is(kind):
    """Nothing is left over from earlier scores and updates."""
    model, units = tiny_detector()
    batches, unit = make_batches(), units['body.conv']
    criterion = begun(kind(aux_epochs=1, epochs=2), model, units.values(), batches)
    state = criterion.state_dict()
    removed = torch.tensor([0, 5])
    criterion.score(model, unit, batches)
    with channels_off(model, [units['stem.conv']], {'stem.conv': removed}):
        criterion.score(model, units['stem.conv'], batches)
        criterion.update(model, units['stem.conv'], removed, batches)
        other = kind(aux_epochs=1, epochs=2)
        other.load_state_dict(state)
        assert torch.equal(criterion.score(model, unit, batches),
                           other.score(model, unit, batches))
        criterion.update(model, unit, removed, batches)
        assert total_loss(criterion, model, unit, batches) == pytest.approx(
            total_loss(other, model, unit, batches))


def pruned(kind, model, limit):
    model = copy.deepcopy(model)
    result = prune(model, groups=[dict(name='all', modules=['*'], ratio=0.5)],
                   batches=make_batches(), input_shape=(3, SIZE, SIZE),
                   criterion=dict(type=f'mmgcp.{kind}', aux_epochs=1, epochs=2,
                                  cache_mib=limit / 2**20))
    return result.plan.removed(), model.state_dict()


@pytest.fixture
def always_run(monkeypatch):
    """Let the detector run whenever outputs are computed, as if all inputs could change."""
    views = Reconstructor.views

    def without_inputs(self, model, unit, batches, find_targets):
        for batch, view in zip(batches, views(self, model, unit, batches, find_targets)):
            yield dataclasses.replace(view, inputs=None, images=batch.images)

    return lambda: monkeypatch.setattr(Reconstructor, 'views', without_inputs)


@pytest.mark.parametrize('kind', ['LCP', 'DCP'])
def test_memory_does_not_change_the_result(kind, always_run):
    """Also where consumers read each other's outputs, and if no inputs are kept."""
    model = randomise(ResidualDetector()).eval()
    (removed, state), *others = [pruned(kind, model, limit) for limit in (ENOUGH, SOME, NOTHING)]
    always_run()
    others.append(pruned(kind, model, NOTHING))
    assert {name: len(item) for name, item in removed.items()} == {'stem.conv': 3, 'body.conv': 4}
    for other_removed, other_state in others:
        assert {name: item.tolist() for name, item in removed.items()} == {
            name: item.tolist() for name, item in other_removed.items()}
        assert all(torch.allclose(value, other_state[name], rtol=1e-4, atol=1e-5)
                   for name, value in state.items() if value.is_floating_point())
