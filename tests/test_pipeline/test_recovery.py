# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Recovery without labels, on small networks."""
import copy
import math

import pytest
import torch
from pruning_samples import residual_toy
from ranks import on_ranks

from mmgcp.errors import PruningError
from mmgcp.pipeline import recovery
from mmgcp.pipeline.recovery import Recovered, Recovery, learning_rate, recover
from mmgcp.pruning import prune
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import gather_channels, remove_channels

SHAPE = (3, 16, 16)


def batches(number=4, size=4):
    return [torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed))
            for seed in range(number)]


def pruned():
    """A pruned network, the original, and the channels that its layers have lost."""
    teacher = residual_toy().eval()
    student, (units, _) = copy.deepcopy(teacher), find_units(teacher, SHAPE)
    removed = {unit.name: torch.tensor([1, 3]) for unit in units}
    remove_channels(student, units, removed)
    return student, teacher, gather_channels(units, removed)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items())


def test_follows_the_original():
    student, teacher, removed = pruned()
    original, before, shown = copied(teacher), copied(student), []
    student.train()
    student.stem.eval()
    student.pred.weight.requires_grad_(False)
    student.pred.bias.grad = torch.ones(5)
    random_state = torch.get_rng_state()
    found = recover(student, teacher, batches(), steps=40, lr=3e-2, removed=removed,
                    progress=lambda *step: shown.append(step))
    assert found.steps_done == 40
    assert found.difference_after < 0.7 * found.difference_before
    # Images that it has not seen
    fresh, gap = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(99)), []
    after = copied(student)
    with torch.no_grad():
        expected = teacher(fresh)
        for state in (before, after):
            student.load_state_dict(state)
            gap.append(float((student.eval()(fresh) - expected).square().mean()))
    assert gap[1] < gap[0]
    assert same(copied(teacher), original)
    assert all(param.grad is None and param.requires_grad for param in teacher.parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items()
               if 'running' in name or 'num_batches' in name)
    assert not torch.equal(after['pred.weight'], before['pred.weight'])
    assert not student.pred.weight.requires_grad and student.pred.bias.requires_grad
    assert torch.equal(student.pred.bias.grad, torch.ones(5))
    assert student.stem.conv.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert shown[0] == ('recovering', 0, 40) and shown[-1] == ('recovering', 40, 40)


def test_modes_are_restored():
    student, teacher, removed = pruned()
    student.train()
    student.stem.eval()
    modes = [module.training for module in student.modules()]
    recover(student, teacher.train(), batches(1), steps=1, removed=removed)
    assert [module.training for module in student.modules()] == modes
    assert all(module.training for module in teacher.modules())


def test_deterministic():
    found = []
    for _ in range(2):
        student, teacher, removed = pruned()
        recover(student, teacher, iter(batches()), steps=3, removed=removed)
        found.append(copied(student))
    assert same(*found)


@pytest.mark.parametrize('lr', [1e3, 1e30])
def test_never_worse(lr):
    """Much too high learning rates lead to weights that are worse, or not finite."""
    student, teacher, removed = pruned()
    before = copied(student)
    found = recover(student, teacher, batches(2), steps=4, lr=lr, removed=removed)
    assert found.difference_after == found.difference_before
    assert same(copied(student), before)


def test_best_state_is_returned(monkeypatch):
    """Not the last one."""
    student, teacher, removed = pruned()
    measured, states = iter([5., 3., 1., 2.]), []

    def measure(self):
        states.append(copied(student))
        return next(measured)

    monkeypatch.setattr(recovery._Training, '_measure', measure)
    found = recover(student, teacher, batches(2), steps=3, removed=removed)
    assert found == (3, 5., 1.)
    assert same(copied(student), states[2]) and not same(states[2], states[3])


def test_steps_are_relative():
    """A step of Adam, which is as long as its rate, moves each tensor by a share of its size."""
    student, teacher, removed = pruned()
    with torch.no_grad():
        student.pred.bias.zero_()
    before, moved = copied(student), {}
    imitation = recovery.make_imitation(student.eval(), teacher, removed, batches(1))
    recovery._Training(student, imitation, batches(1), 1e-2)._step(batches()[0], 0.05)
    for name, param in student.named_parameters():
        size = float(before[name].square().mean().sqrt())
        moved[name] = float((param - before[name]).abs().max()) / max(size, 1e-3)
    assert all(value == pytest.approx(1e-2, rel=0.02) for value in moved.values()), moved


def test_goes_back_only_from_what_is_worse_than_at_first(monkeypatch):
    """On the way a high rate may do worse than the best state; falling, it does better."""
    student, teacher, removed = pruned()
    measured, states = iter([5., 3., 4., 6., 2.]), []

    def measure(self):
        states.append(copied(student))
        return next(measured)

    monkeypatch.setattr(recovery._Training, '_measure', measure)
    monkeypatch.setattr(recovery, 'MEASURED_AT', (0.2, 0.5, 0.8))
    rates = []
    monkeypatch.setattr(recovery._Training, '_copy', (
        lambda self, copy=recovery._Training._copy: rates.append(self._lr) or copy(self)))
    found = recover(student, teacher, batches(2), steps=10, lr=1e-2, removed=removed)
    assert found == (10, 5., 2.) and same(copied(student), states[4])
    assert rates == [1e-2, 1e-2, pytest.approx(1e-2 / 3)]  # when it came, at 3 and at 2


def test_held_out_images_are_not_trained_with(monkeypatch):
    seen, student = [], pruned()[0]
    images = [torch.full((3, 1, 1, 1), 0.) + torch.arange(3 * i, 3 * i + 3)[:, None, None, None]
              for i in range(30)]
    held_out = torch.cat(recovery._held_out(images, student.pred.weight)).flatten().tolist()
    stream = recovery._endless(images)
    for _ in range(60):  # twice
        seen += next(stream).flatten().tolist()
    assert held_out == list(range(1, 64, 4))
    assert sorted(seen) == sorted(2 * [number for number in range(90) if number not in held_out])


@pytest.mark.parametrize('number, size', [(1, 1), (2, 1), (1, 3)])
def test_few_images(number, size):
    student, teacher, removed = pruned()
    found = recover(student, teacher, batches(number, size), steps=5, lr=3e-2,
                    removed=removed)
    assert found.steps_done == 5 and found.difference_after < found.difference_before


def test_time_limit(monkeypatch):
    """Each look at the clock takes 10 seconds; the rate follows the time."""
    student, teacher, removed = pruned()
    clock, shown = iter(range(0, 10000, 10)), []
    monkeypatch.setattr(recovery.time, 'monotonic', lambda: next(clock))
    found = recover(student, teacher, batches(1), minutes=1, removed=removed,
                    progress=lambda *step: shown.append(step))
    assert found.steps_done == 5
    assert shown == [('recovering', seconds, 60) for seconds in range(10, 70, 10)]


def test_no_time():
    student, teacher, removed = pruned()
    before = copied(student)
    found = recover(student, teacher, [], minutes=0, removed=removed)
    assert found.steps_done == 0 and math.isnan(found.difference_after)
    assert same(copied(student), before)


def test_learning_rate():
    rates = [learning_rate(share / 100) for share in range(101)]
    assert rates[0] < 0.03 and max(rates) > 0.98 and rates[100] == 0
    top = rates.index(max(rates))
    assert top == 5 and rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize('options, text', [
    (dict(minutes=-1),
     'minutes of the recovery must be a finite number that is not negative, but is -1'),
    (dict(minutes=math.nan), 'minutes of the recovery must be a finite number'),
    (dict(minutes='3'), "minutes of the recovery must be a finite number .* but is '3'"),
    (dict(minutes=math.inf), 'minutes of the recovery must be a finite number'),
    (dict(minutes=True), 'minutes of the recovery must be a finite number'),
    (dict(steps=0), 'steps of the recovery must be a positive integer, but is 0'),
    (dict(steps=1, lr=0), 'lr of the recovery must be a positive number, but is 0'),
    (dict(steps=1, lr=None), 'lr of the recovery must be a positive number'),
    (dict(), 'recovery needs minutes or steps'),
])
def test_settings(options, text):
    with pytest.raises(PruningError, match=text):
        Recovery([], **options)


def test_turns(monkeypatch):
    """Minutes and steps are divided among them."""
    given = []
    monkeypatch.setattr('mmgcp.pipeline.recovery.recover', lambda *_, **settings: given.append(
        (settings['minutes'], settings['steps'])) or Recovered(1, 2., 1.))
    found = Recovery([], minutes=6, steps=7, turns=3)(None, None, {})
    assert given == [(2, 2)] and found == dict(
        minutes=6, steps=7, lr=1e-3, turns=3, steps_done=1, difference_before=2.,
        difference_after=1.)
    Recovery([], steps=2, turns=3)(None, None, {})
    assert given[1:] == [(None, 1)]


@pytest.mark.parametrize('images', [[], [torch.rand(0, *SHAPE)]])
def test_no_images(images):
    student, teacher, removed = pruned()
    with pytest.raises(PruningError, match='there are no images to recover with'):
        recover(student, teacher, images, steps=1, removed=removed)


def test_interrupted():
    student, teacher, removed = pruned()
    before = copied(student)

    def interrupt(stage, done, steps):
        if done == 3:
            assert not same(copied(student), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, batches(2), steps=5, removed=removed, progress=interrupt)
    assert same(copied(student), before)
    assert all(param.grad is None for param in student.parameters())


def test_as_an_option_of_prune():
    """The original that it follows is that from before pruning, and the report tells of it."""
    results = []
    for recovering in (None, Recovery(batches(), steps=20, lr=3e-2)):
        model = residual_toy().eval()
        results.append(prune(model, ratio=0.4, allocation='uniform', input_shape=SHAPE,
                             calibration=batches(1), recover=recovering))
    original, image = residual_toy().eval(), batches()[3]
    with torch.no_grad():
        plain, recovered = (float((result.model(image) - original(image)).square().mean())
                            for result in results)
    assert recovered < plain
    assert results[0].recovery == {} and results[0].plan.units == results[1].plan.units
    report = results[1].report['recovery']
    assert (report['steps'], report['steps_done']) == (20, 20)
    assert report['difference_after'] < report['difference_before']
    model = residual_toy().eval()
    before = copied(model)
    assert prune(model, ratio=0.4, input_shape=SHAPE, dry_run=True,
                 recover=Recovery([], steps=1)).recovery == {}
    with pytest.raises(PruningError, match='no images to recover with'):
        prune(model, ratio=0.4, input_shape=SHAPE, recover=Recovery([], steps=1))
    assert same(copied(model), before) and model.stem.conv.out_channels == 8


def recover_in_process(folder):
    """On rank 0 two batches, on rank 1 one of another size."""
    torch.set_num_threads(1)
    student, teacher, removed = pruned()
    rank = torch.distributed.get_rank()
    found = recover(student, teacher, batches(2) if rank == 0 else batches(1, 2), steps=4, lr=3e-2,
                    removed=removed)
    return found._asdict(), student.state_dict()


def test_several_processes(tmp_path):
    first, second = on_ranks(__file__, 'recover_in_process', tmp_path)
    assert first[0] == second[0] and same(first[1], second[1])
    assert first[0]['difference_after'] < first[0]['difference_before']
