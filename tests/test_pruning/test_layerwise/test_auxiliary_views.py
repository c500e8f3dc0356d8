# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What losses of a batch have in common is computed once, and leads to the same."""
import copy

import pytest
import torch
from auxiliary_toys import SIZE, TinyDetector, begun, make_batches, tiny_detector
from pruning_samples import Block, randomise

from mmgcp.pruning import prune
from mmgcp.pruning.layerwise import DCP, LCP
from mmgcp.pruning.layerwise.auxiliary import auxiliary_criterion, lookahead
from mmgcp.pruning.layerwise.auxiliary.recording import record_inputs
from mmgcp.pruning.masking import channels_off

ENOUGH, SOME, NOTHING = 2**28, 2 * SIZE**2 * 4 * 6, 0


def test_inputs_are_those_of_the_layers():
    model, units = tiny_detector()
    images = make_batches(1)[0].images
    with channels_off(model, [units['stem.conv']], {'stem.conv': torch.tensor([1, 3])}):
        inputs = record_inputs(model, images, dict.fromkeys(('body.conv', 'pred'), 1))
    wanted = model.stem(images).index_fill(1, torch.tensor([1, 3]), 0)
    model.requires_grad_(False)
    assert inputs is None  # what pred reads changes with the body
    with channels_off(model, [units['stem.conv']], {'stem.conv': torch.tensor([1, 3])}):
        inputs = record_inputs(model, images, dict.fromkeys(('body.conv', 'pred'), 1))
    assert torch.allclose(inputs['body.conv'][0], wanted)
    assert torch.allclose(inputs['pred'][0], model.body(wanted))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def runs(monkeypatch):
    """What detectors run for: 'inputs' of the pruned one, 'outputs' of the original."""
    runs = []

    def count(module, kind):
        real = getattr(module, f'record_{kind}')
        monkeypatch.setattr(module, f'record_{kind}',
                            lambda *args: (runs.append(kind), real(*args))[1])

    count(auxiliary_criterion, 'inputs')
    count(lookahead, 'outputs')
    return runs


@pytest.mark.parametrize('kind', [LCP, DCP])
def test_the_detector_runs_once_a_batch(kind, runs):
    """For the scores and the update: the original, if it has not been before, and the pruned."""
    model, units = tiny_detector()
    batches = make_batches()
    criterion = begun(kind(aux_epochs=1, epochs=5), model, units.values(), batches)
    assert list(units) == ['stem.conv', 'body.conv']
    criterion.score(model, units['stem.conv'], batches)
    assert sorted(runs) == ['inputs'] * 2 + ['outputs'] * 2
    removed = torch.tensor([0, 5])
    with channels_off(model, [units['stem.conv']], {'stem.conv': removed}):
        criterion.update(model, units['stem.conv'], removed, batches)
        assert sorted(runs) == ['inputs'] * 2 + ['outputs'] * 2
        assert criterion._views == {}
        criterion.score(model, units['body.conv'], batches)
        assert sorted(runs) == ['inputs'] * 4 + ['outputs'] * 2
        criterion.update(model, units['body.conv'], removed, batches)
    assert sorted(runs) == ['inputs'] * 4 + ['outputs'] * 2


def test_the_detector_runs_again_without_memory(runs):
    model, units = tiny_detector()
    batches = make_batches()
    criterion = begun(LCP(aux_epochs=1, epochs=5, cache_mib=0), model, units.values(), batches)
    for unit in units.values():
        criterion.score(model, unit, batches)
        criterion.update(model, unit, torch.tensor([0, 5]), batches)
    # for the scores, the epochs, the loss before and after
    assert sorted(runs) == ['inputs'] * 2 * 8 * 2 + ['outputs'] * 2 * 8 * 2


class ResidualDetector(TinyDetector):
    """Its prediction layer and its shortcut's block read the same channels."""

    def __init__(self):
        super().__init__()
        self.more = Block(8, 8, 3)

    def extract_feat(self, images):
        feature, = super().extract_feat(images)
        return [feature + self.more(feature)]


def pruned(kind, model, monkeypatch, limit, always_run=False):
    model = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        if always_run:
            patch.setattr(auxiliary_criterion, 'record_inputs', lambda *_: None)
        result = prune(model, groups=[dict(name='all', modules=['*'], ratio=0.5)],
                       batches=make_batches(), input_shape=(3, SIZE, SIZE),
                       criterion=dict(type=f'mmgcp.{kind}', aux_epochs=1, epochs=2,
                                      cache_mib=limit / 2**20))
    return result.plan.removed(), model.state_dict()


@pytest.mark.parametrize('kind', ['LCP', 'DCP'])
def test_nothing_else_comes_out(kind, monkeypatch):
    """With layers that read each other's outputs, and with little memory."""
    model = randomise(ResidualDetector()).eval()
    cases = [(ENOUGH, False), (SOME, False), (NOTHING, False), (NOTHING, True)]
    (removed, state), *others = [pruned(kind, model, monkeypatch, *case) for case in cases]
    assert {name: len(item) for name, item in removed.items()} == {'stem.conv': 3, 'body.conv': 4}
    for other_removed, other_state in others:
        assert {name: item.tolist() for name, item in removed.items()} == {
            name: item.tolist() for name, item in other_removed.items()}
        assert all(torch.allclose(value, other_state[name], rtol=1e-4, atol=1e-5)
                   for name, value in state.items() if value.is_floating_point())
