# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The rank correlation of scores with accuracies after a training."""
import json

import pytest
from scripts import output_of, write_pruning_files


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark('score_rank.py')


def test_correlation_by_hand(benchmark):
    """1 - 6 sum(d^2) / (n (n^2 - 1)) of the ranks 4, 3, 2, 1 and 3, 4, 1, 2."""
    rows = [dict(model=name, macs=2e9, score=score)
            for name, score in zip('abcd', (0.9, 0.5, 0.4, 0.1))]
    text = benchmark.module.report(rows, dict(a=0.6, b=0.7, c=0.2, d=0.3), 2)
    assert text.endswith(f'Spearman: {1 - 6 * 4 / (4 * 15):.3f}')
    assert [line.split()[1] for line in text.splitlines()[2:6]] == list('abcd')


def test_equal_values_share_their_rank(benchmark):
    """Ranks 1.5, 1.5, 3 and 1, 2, 3: a covariance of 1.5 of variances 1.5 and 2."""
    correlation = benchmark.module.rank_correlation([0.2, 0.2, 0.7], [0.1, 0.3, 0.4])
    assert correlation == pytest.approx(1.5 / (1.5 * 2)**0.5)


def test_models_are_trained_once(benchmark, tmp_path, write_config, capsys, monkeypatch):
    files = write_pruning_files(write_config(tmp_path / 'tiny.py'),
                                "\nprune_cfg = dict(allocation='uniform', round_to=1)\n")
    output_of('analysis_tools/pareto.py', *files, '--calib-batches', 1, '--shares', 0.9, 0.8, 0.6,
              '--depths', 0, '--val-images', 2, '--work-dir', tmp_path / 'out')
    capsys.readouterr()
    benchmark(tmp_path / 'out', '--epochs', 1)
    first = capsys.readouterr().out
    names = [f'0-blocks-{share}' for share in (0.9, 0.8, 0.6)]
    for name in names:
        result = tmp_path / f'out/finetuned/{name}-1epochs-0/result.json'
        assert len(json.loads(result.read_text())['epoch_seconds']) == 1
        assert name in first
    monkeypatch.setattr(benchmark.module, 'train', None)
    benchmark(tmp_path / 'out', '--epochs', 1)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize('content, message', [
    ('', 'has no pareto.json that can be read'),
    ('{"models": []}', 'has 0 pruned models, too few'),
    ('{"models": [' + ', '.join(3 * ['{"name": "a", "model": "a", "score": 1}']) + ']}',
     'was scored by the loss'),
])
def test_folders_that_do_not_fit(benchmark, tmp_path, content, message):
    (tmp_path / 'pareto.json').write_text(content)
    with pytest.raises(benchmark.module.UserError, match=message):
        benchmark.module.read_rows(tmp_path)
