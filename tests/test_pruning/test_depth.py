# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Depth pruning through prune(): which blocks go, together with channels, plans and steps."""
import copy

import pytest
import torch
from block_toys import SHAPE, block_net, make_batches, outputs
from loss_toys import assert_as_before, silent, snapshot
from pruning_samples import difference

from mmgcp.analysis import count_complexity
from mmgcp.errors import PruningError
from mmgcp.nn.hooks import on_outputs
from mmgcp.pruning import PruningPlan, prune, rehearse_pruning
from mmgcp.pruning.blocks.scores import block_costs, mean_loss
from mmgcp.pruning.report import summarize, write_report

NAMES = ['row.0', 'row.1', 'row.2', 'single']


def images(number=4, count=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, *SHAPE, generator=generator) for _ in range(number)]


def branches_off(model, names):
    return on_outputs(model, {f'{name}.last': lambda _, output: torch.zeros_like(output)
                              for name in names})


def test_named_blocks_alone():
    model = block_net().double()
    original = copy.deepcopy(model)
    result = prune(model, remove_blocks=['row.1', 'single'], compensate=False, input_shape=SHAPE)
    assert result.model is model and result.absent_blocks == {'row.1': 'alpha', 'single': None}
    with branches_off(original, ['row.1', 'single']):
        assert difference(outputs(original), outputs(model)) < 1e-9
    assert result.changed_channels == {} and result.scores == {}
    assert [(block.name, block.kind, block.removed) for block in result.plan.blocks] == [
        ('stem.1', 'plain', False), ('row.0', 'residual', False), ('row.1', 'residual', True),
        ('row.2', 'residual', False), ('single', 'residual', True)]
    assert result.plan.skipped_blocks['twice'] == 'it runs 2 times for an image'
    before, after = count_complexity(original, SHAPE), count_complexity(model, SHAPE)
    assert (result.params, result.macs) == ([before[0], after[0]], [before[1], after[1]])
    rows = {row.layer: row for row in result.layers}
    assert rows['single.first.conv'].after == 0 and rows['row.2.first.conv'].after == 10


def test_a_plain_block_can_be_named():
    model = block_net().double()
    original = copy.deepcopy(model)
    prune(model, remove_blocks=['stem.1'], compensate=False, input_shape=SHAPE)
    with on_outputs(original, {'stem.1': lambda x, _: x.clone()}):
        assert difference(outputs(original), outputs(model)) < 1e-9


def test_budgets_are_shares_of_the_whole():
    model = block_net()
    macs = count_complexity(model, SHAPE)[1]
    result = prune(model, remove_blocks=['row.1'], target_flops=0.5, input_shape=SHAPE)
    assert result.macs == [macs, count_complexity(model, SHAPE)[1]]
    assert 0.48 * macs < result.macs[1] <= 0.505 * macs
    assert result.changed_channels


def test_blocks_and_channels_are_removed_exactly():
    model = block_net().double()
    original = copy.deepcopy(model)
    result = prune(model, remove_blocks=['row.1'], target_flops=0.5, compensate=False,
                   input_shape=SHAPE)
    with torch.no_grad():
        for item in result.plan.units:
            for layer in item.layers:
                module = original.get_submodule(layer)
                module.weight[item.removed] = 0
                if module.bias is not None:
                    module.bias[item.removed] = 0
        for name in result.channels_after:  # shortcuts end where relu has no offset
            assert name in dict(original.named_modules())
    with branches_off(original, ['row.1']):
        assert difference(outputs(original), outputs(model)) < 1e-9


def test_layers_behind_blocks_are_fitted_to_the_original():
    model = block_net()
    plain, fitted, adapted = (copy.deepcopy(model) for _ in range(3))
    prune(plain, remove_blocks=['row.1'], compensate=False, input_shape=SHAPE)
    result = prune(fitted, remove_blocks=['row.1'], calibration=images(), input_shape=SHAPE)
    prune(adapted, remove_blocks=['row.1'], calibration=images(), compensate='adapt-norms',
          input_shape=SHAPE)
    assert result.compensation == 'reconstruct'
    assert 'row.2.first.conv' in result.fits and 'row.0.first.conv' not in result.fits
    assert not any(name.startswith('row.1.') for name in result.fits)
    expected = outputs(model.double())
    lost = [difference(expected, outputs(other.double())) for other in (plain, adapted, fitted)]
    assert lost[2] < 0.7 * lost[0] and lost[1] < lost[0]


def test_channels_and_blocks_are_made_up_for_together():
    model = block_net()
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    settings = dict(remove_blocks=['row.1'], target_flops=0.6, input_shape=SHAPE)
    plan = prune(plain, compensate=False, **settings).plan
    prune(fitted, plan=plan, calibration=images(), input_shape=SHAPE)
    expected = outputs(model.double())
    assert difference(expected, outputs(fitted.double())) < 0.7 * difference(
        expected, outputs(plain.double()))


def test_a_plan_is_applied_again(tmp_path):
    model = block_net()
    other, data = copy.deepcopy(model), images()
    result = prune(model, remove_blocks=['row.1', 'single'], target_flops=0.5, calibration=data,
                   input_shape=SHAPE)
    result.plan.save(tmp_path / 'plan.json')
    assert PruningPlan.load(tmp_path / 'plan.json') == result.plan
    again = prune(other, plan=tmp_path / 'plan.json', calibration=data, input_shape=SHAPE)
    assert again.absent_blocks == result.absent_blocks
    assert again.channels_after == result.channels_after and again.plan == result.plan
    assert difference(outputs(model.double()), outputs(other.double())) < 1e-5


@pytest.mark.parametrize('names, edited', [
    ([], ['row.0']), (['row.1'], ['row.0', 'single']), (['single'], []), (['stem.1'], []),
])
def test_blocks_in_a_plan_can_be_edited(names, edited):
    model = block_net().double()
    original = copy.deepcopy(model)
    dry = prune(copy.deepcopy(model), remove_blocks=names or None, ratio=0.3, dry_run=True,
                input_shape=SHAPE)
    plan = dry.plan
    for block in plan.blocks:
        block.removed = block.name in edited
    result = prune(model, plan=plan, compensate=False, input_shape=SHAPE)
    assert sorted(result.absent_blocks) == edited
    lost = {item.name: item.removed for item in result.plan.units}
    assert any(lost.values())
    assert not any(name.startswith(block) for name in lost for block in edited)
    gone = {layer: item.removed for item in result.plan.units for layer in item.layers}
    with torch.no_grad():
        for layer, channels in gone.items():
            original.get_submodule(layer).weight[channels] = 0
            if original.get_submodule(layer).bias is not None:
                original.get_submodule(layer).bias[channels] = 0
    with branches_off(original, edited):
        assert difference(outputs(original), outputs(model)) < 1e-9


def test_a_number_of_blocks():
    model, batches = block_net(), make_batches()
    result = prune(model, remove_blocks=2, batches=batches, input_shape=SHAPE)
    assert len(result.plan.removed_blocks) == 2
    assert set(result.plan.removed_blocks) < set(NAMES)
    for block in result.plan.blocks:
        assert (block.score is not None) == block.removed


def test_a_block_that_others_make_up_for_goes_first():
    """One without which the loss rises most, until what reads it has been fitted anew."""
    batches = make_batches()
    options = dict(remove_blocks=1, batches=batches, input_shape=SHAPE,
                   calibration=[batch.images for batch in batches])
    losses = {}
    for name in NAMES:
        model = block_net()
        prune(model, **dict(options, remove_blocks=[name]))
        losses[name] = mean_loss(model, batches, silent)
    whole = mean_loss(block_net(), batches, silent)
    costs = block_costs(block_net(), NAMES, SHAPE)
    result = prune(block_net(), **options)
    best = min(NAMES, key=lambda name: (max(losses[name] - whole, 0) / costs[name][1],
                                        losses[name] - whole))
    assert result.plan.removed_blocks == [best]
    score, = (block.score for block in result.plan.blocks if block.removed)
    assert score == pytest.approx(losses[best] - whole, rel=1e-4, abs=1e-6)


def test_plain_blocks_have_to_be_allowed():
    with pytest.raises(PruningError, match='the detector has 4 residual blocks that can be'):
        prune(block_net(), remove_blocks=5, batches=make_batches(), input_shape=SHAPE)
    result = prune(block_net(), remove_blocks=5, plain_blocks=True, batches=make_batches(),
                   input_shape=SHAPE)
    assert 'stem.1' in result.plan.removed_blocks


def test_auto_keeps_the_number_with_the_least_loss():
    batches = make_batches()
    settings = dict(target_flops=0.5, batches=batches, input_shape=SHAPE, round_to=2,
                    allocation='uniform',
                    calibration=[batch.images for batch in batches])
    model = block_net()
    result = prune(model, remove_blocks='auto', **settings)
    tried = {item['blocks']: item['loss'] for item in result.plan.options['depth']}
    assert 0 in tried and len(tried) > 1
    best = min(tried, key=tried.get)
    assert len(result.plan.removed_blocks) == best
    for number in (0, best):
        other = block_net()
        prune(other, remove_blocks=number or None, **settings)
        assert mean_loss(other, batches, silent) == pytest.approx(tried[number], rel=1e-4)
    assert mean_loss(model, batches, silent) == pytest.approx(tried[best], rel=1e-4)


def test_auto_does_not_go_beyond_the_budget():
    model = block_net()
    result = prune(model, remove_blocks='auto', target_flops=0.97, batches=make_batches(),
                   allocation='uniform', input_shape=SHAPE)
    assert [item['blocks'] for item in result.plan.options['depth']] == [0]
    assert result.absent_blocks == {}


def test_blocks_that_leave_less_than_the_budget():
    model = block_net()
    with pytest.warns(UserWarning, match='the removed blocks alone leave'):
        result = prune(model, remove_blocks=NAMES, target_flops=0.9, input_shape=SHAPE)
    assert result.changed_channels == {}


@pytest.mark.parametrize('options', [
    dict(remove_blocks=['row.1', 'single'], ratio=0.3),
    dict(remove_blocks=2, batches=make_batches()),
    dict(remove_blocks='auto', batches=make_batches(), target_params=0.6, round_to=2,
         allocation='uniform'),
])
def test_a_dry_run_changes_nothing(options):
    model = block_net()
    modules, before = list(model.modules()), snapshot(model)
    result = prune(model, calibration=images(), dry_run=True, input_shape=SHAPE, **options)
    assert_as_before(model, before)
    assert list(model.modules()) == modules and result.model is model
    real = prune(model, calibration=images(), input_shape=SHAPE, **options)
    assert real.absent_blocks == result.absent_blocks
    assert real.channels_after == result.channels_after


@pytest.mark.parametrize('options, message', [
    (dict(remove_blocks=['row.9']), "the detector has no block 'row.9' that can be removed: there "
     'are stem.1, row.0, row.1, row.2, single$'),
    (dict(remove_blocks=['twice']), "the block 'twice' cannot be removed: it runs 2 times"),
    (dict(remove_blocks=['row.0', 'row.0']), "the block 'row.0' is to be removed twice"),
    (dict(remove_blocks=2), 'needs training data to choose blocks by'),
    (dict(remove_blocks='auto', ratio=0.3), 'needs training data to choose blocks by'),
    (dict(remove_blocks='auto', batches=[]), 'needs to know how much is pruned'),
    (dict(remove_blocks='auto', groups=[dict(name='a', modules=['row'])]), 'how much is pruned'),
    (dict(remove_blocks=0), 'remove_blocks must be names of blocks, their number'),
    (dict(remove_blocks='all'), 'remove_blocks must be names of blocks, their number'),
    (dict(remove_blocks=True), 'remove_blocks must be names of blocks, their number'),
    (dict(remove_blocks=[]), 'remove_blocks must be names of blocks, their number'),
    (dict(remove_blocks=1, block_criterion='size'), 'block_criterion must be one of'),
    (dict(remove_blocks=['row.0'], compensate='reconstruct'), 'needs calibration images'),
    (dict(remove_blocks=['row.0'], criterion=dict(type='mmgcp.CPSCA')),
     'CPSCA cannot prune what removed blocks leave: '),
])
def test_wrong_requests(options, message):
    model = block_net()
    before = snapshot(model)
    with pytest.raises(PruningError, match=message):
        prune(model, input_shape=SHAPE, **options)
    assert_as_before(model, before)


def test_an_error_brings_the_blocks_back():
    model = block_net()
    modules, before = list(model.modules()), snapshot(model)
    with pytest.raises(PruningError, match='cannot be reached'):
        prune(model, remove_blocks=['row.0'], target_params=0.001, calibration=images(),
              input_shape=SHAPE)
    assert_as_before(model, before)
    assert list(model.modules()) == modules


def test_in_steps_with_training():
    model, seen = block_net(), []
    result = prune(model, remove_blocks=['row.1'], target_flops=0.4, steps=2,
                   calibration=images(), input_shape=SHAPE,
                   finetune=lambda model, number: seen.append(count_complexity(model, SHAPE)[1]))
    assert len(seen) == 1 and result.macs[1] < seen[0] < result.macs[0]
    assert result.absent_blocks == {'row.1': 'alpha'}
    assert 0.37 < result.macs[1] / result.macs[0] <= 0.41


def test_layer_by_layer():
    model, batches = block_net(), make_batches()
    result = prune(model, remove_blocks=['row.1'], ratio=0.3, batches=batches,
                   calibration=[batch.images for batch in batches], input_shape=SHAPE,
                   criterion=dict(type='mmgcp.ThiNet'))
    assert result.absent_blocks == {'row.1': 'alpha'} and result.changed_channels
    assert count_complexity(model, SHAPE) == (result.params[1], result.macs[1])


def test_pruned_again():
    model = block_net()
    prune(model, remove_blocks=['row.1'], ratio=0.2, input_shape=SHAPE)
    result = prune(model, remove_blocks=['row.0'], ratio=0.2, input_shape=SHAPE)
    assert result.absent_blocks == {'row.0': None}
    assert 'row.1' not in [block.name for block in result.plan.blocks]


def test_rehearsing():
    model = block_net()
    modules, before = list(model.modules()), snapshot(model)
    for blocks in (['row.1'], 3, 'auto'):
        rehearse_pruning(model, remove_blocks=blocks, target_flops=0.6, input_shape=SHAPE)
    rehearse_pruning(model, remove_blocks=['row.1'], input_shape=SHAPE)
    for blocks, message in ((['row.9'], "no block 'row.9'"), (9, 'the detector has 4 residual')):
        with pytest.raises(PruningError, match=message):
            rehearse_pruning(model, remove_blocks=blocks, target_flops=0.6, input_shape=SHAPE)
    assert_as_before(model, before)
    assert list(model.modules()) == modules


def test_reports(tmp_path):
    result = prune(block_net(), remove_blocks=['row.1', 'single'], input_shape=SHAPE)
    assert '2 blocks removed: row.1, single' in summarize(result).splitlines()
    write_report(result, tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '## Removed blocks\n\n- row.1\n- single\n' in text
    assert '- twice: it runs 2 times for an image\n' in text.split('## Blocks that cannot be')[1]
    assert result.report['blocks'][2] == dict(name='row.1', kind='residual', removed=True,
                                              score=None)


def test_recovery_gets_the_whole_original():
    model, seen = block_net(), []

    def recover(pruned, original, channels):
        seen.append((len(list(pruned.parameters())), len(list(original.parameters()))))
        return {}

    prune(model, remove_blocks=['row.0'], ratio=0.2, recover=recover, input_shape=SHAPE)
    assert seen[0][0] < seen[0][1] == len(list(block_net().parameters()))
