# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The comparison of devices: on the CPU nothing differs, and what differs is told."""
import pytest

pytestmark = pytest.mark.slow


ARGUMENTS = ('--device', 'cpu', '--size', 64, '--batch-size', 2)


@pytest.fixture
def check(load_benchmark):
    return load_benchmark('device_check.py')


def test_same_device(check, monkeypatch, capsys):
    monkeypatch.setattr(check.module, 'TRAININGS', ('proximal', 'attention'))
    check(*ARGUMENTS)
    table = capsys.readouterr().out
    for title in ('hook, proximal', 'hook, proximal, channels last', 'distiller, attention',
                  'pruning, channels', 'pruning, outputs'):
        assert f'| {title} ' in table
    assert 'not pruned' in table


def test_difference(check, monkeypatch, capsys):
    """What channels last computes is another thing here."""
    module = check.module
    results = module.CheckedTraining.results
    monkeypatch.setattr(module, 'TRAININGS', ('proximal', ))

    def wrong(training):
        loss, change = results(training)
        return loss, change * (1.001 if training.kind else 1)

    monkeypatch.setattr(module.CheckedTraining, 'results', wrong)
    with pytest.raises(SystemExit, match='something differs'):
        check(*ARGUMENTS)
    assert '1.0e-03' in capsys.readouterr().out
