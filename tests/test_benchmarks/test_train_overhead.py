# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of a training step: figures, verdicts, and how it ends."""
import json

import pytest
import torch
from scripts import ROOT

CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-48e_demo-160.py'
BASELINES = dict(subgradient='plain', proximal='plain', coupled='plain', attention='by_hand',
                 cwd='by_hand', response='by_hand')
HEADER = ['variant', 'step', 'without', 'more', 'quartiles', 'on CPU', 'met', 'memory', 'more',
          'met']
TINY = ('--config', CONFIG, '--size', 64, '--batch-size', 1, '--pairs', 1, '--iterations', 2,
        '--threads', 1, '--device', 'cpu')


OWN = {'loss_cls', 'loss_bbox', 'loss_obj'}
ATTENTION = OWN | {'loss_attention_backbone', 'loss_attention_neck'}
RESPONSE = {f'loss_response_{part}' for part in ('cls', 'obj', 'box')}
LOSSES = dict(attention=ATTENTION, cwd=ATTENTION | {'loss_channel_cwd'},
              response=ATTENTION | RESPONSE | {'loss_channel_cwd'})


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    """A function that runs the script in this process, which has imported everything."""
    run = load_benchmark('train_overhead.py')
    monkeypatch.setattr(run.module, 'WARM_UP', 1)
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.mark.slow
def test_figures_of_all_variants(benchmark, monkeypatch, tmp_path, capsys):
    peaks = {}

    def run_in_process(request):
        peaks[request['variant']] = 2**20 * (100 + 2 * len(peaks))
        return peaks[request['variant']]

    losses, hooks, teachers = {}, {}, set()

    class Recording(benchmark.module.Training):

        def step(self):
            parse = type(self.model).parse_losses

            def parse_losses(found):
                losses[self.variant] = set(found)
                return parse(self.model, found)

            self.model.parse_losses = parse_losses
            super().step()
            if self.hook is not None:
                hooks[self.variant] = self.hook.penalty, self.hook.coupled
            if self.teacher is not None:
                teachers.add(self.variant)

    monkeypatch.setattr(benchmark.module, 'run_in_process', run_in_process)
    monkeypatch.setattr(benchmark.module, 'Training', Recording)
    benchmark(*TINY, '--out', tmp_path / 'out.json')

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    header, rule, *rows = (cells(line) for line in lines if line.startswith('|'))
    assert header == HEADER
    assert len(rows) == 8 and {len(row) for row in [rule, *rows]} == {len(header)}
    assert any(line.startswith('Goal of the hook, at most 1% more: time ') for line in lines)
    assert any(line.startswith('Goal of the distiller, at most 5% more: time ') for line in lines)
    assert lines[-1].startswith('Machine: ') and '1 threads' in lines[-1]

    report = json.loads((tmp_path / 'out.json').read_text())
    assert set(report) == {'machine', 'device', 'config', 'student', 'params', 'batch_size', 'size',
                           'iterations', 'pairs', 'goals', 'other_cores', 'variants'}
    assert (report['batch_size'], report['size'], report['pairs'], report['iterations']) == (
        1, 64, 1, 2)
    assert report['goals'] == dict(hook=0.01, distiller=0.05)
    assert 0 < report['params']['student'] < report['params']['model']
    variants = report['variants']
    assert list(variants) == list(benchmark.module.TITLES) == list(peaks)
    assert losses == {name: LOSSES.get(name, OWN) for name in variants}
    assert teachers == {'by_hand'}
    assert hooks == dict(subgradient=('subgradient', False), proximal=('proximal', False),
                         coupled=('subgradient', True))
    for (name, figures), row in zip(variants.items(), rows):
        assert figures['peak_bytes'] == peaks[name]
        assert row[0] == benchmark.module.TITLES[name]
        assert row[1] == f'{1e3 * figures["seconds"]:.1f}'
        assert row[7] == f'{peaks[name] / 2**20:.1f}'
        if name not in BASELINES:
            assert row[2:7] == ['-'] * 5 and row[8:] == ['-', '-']
            continue
        (without, trained), = (pair['seconds'] for pair in figures['pairs'])
        assert figures['against'] == BASELINES[name]
        assert (figures['against_seconds'], figures['seconds']) == (without, trained)
        assert figures['ratio'] == pytest.approx(trained / without)
        assert figures['quartiles'] == [figures['ratio']] * 2
        assert figures['goal'] == (1.01 if BASELINES[name] == 'plain' else 1.05)
        assert figures['time_met'] == (figures['ratio'] <= figures['goal'])
        assert figures['memory_ratio'] == peaks[name] / peaks[BASELINES[name]]
        assert row[3] == f'{figures["ratio"] - 1:+.1%}'
        assert row[6].rstrip('?') == ('yes' if figures['time_met'] else 'no')
        assert row[9] == ('yes' if figures['memory_met'] else 'no')
    assert [variants[name]['memory_met'] for name in BASELINES] == [False] * 3 + [True, True, False]


def test_medians_and_quartiles(benchmark, capsys):
    module = benchmark.module
    pairs = [dict(seconds=[1., 1. + extra], cpu_seconds=[1., 1.])
             for extra in (0., .005, .0075, .02, .5)]
    variants = module.summarize(dict(proximal=pairs), dict(plain=1000, proximal=1010))
    assert list(variants) == ['plain', 'proximal']
    figures = variants['proximal']
    assert (figures['ratio'], figures['cpu_ratio']) == (1.0075, 1.)
    assert figures['quartiles'] == [1.005, 1.02]
    assert figures['time_met'] and figures['memory_met']
    assert figures['goal'] == 1.01  # between the quartiles

    settings = ['config', 'student', 'batch_size', 'size', 'pairs', 'iterations', 'device']
    report = dict(dict.fromkeys(settings, 'some'), params=dict(model=1, student=1),
                  other_cores=None, machine=dict(cpu='', cores=1, threads=1, torch=''))
    for met, verdict in ((True, 'time met; '), (False, 'time missed by proximal; ')):
        module.print_report(dict(report, variants=dict(
            variants, proximal=dict(figures, time_met=met))))
        printed = capsys.readouterr().out
        row = next(cells(line) for line in printed.splitlines()
                   if line.startswith(f'| {module.TITLES["proximal"]} '))
        assert row[6] == ('yes?' if met else 'no?')
        assert f'at most 1% more: {verdict}' in ' '.join(printed.split())


def test_child_measures_the_memory(benchmark, capsys, monkeypatch):
    setup = dict(config=str(CONFIG), size=64, batch_size=1, device='cpu', max_iters=4,
                 threads=torch.get_num_threads(), variant='plain')
    benchmark('--child', json.dumps(setup))
    assert set(json.loads(capsys.readouterr().out)) == {'peak_bytes'}


def test_a_failing_variant_ends_in_one_sentence(benchmark, tmp_path):
    student = tmp_path / 'student.py'
    student.write_text(f"_base_ = {str(CONFIG)!r}\nmodel = dict(neck=dict(type='NoNeck'))\n")
    with pytest.raises(SystemExit) as caught:
        benchmark(*TINY, '--student', student)
    assert 'NoNeck' in caught.value.code


@pytest.mark.parametrize('arguments, message', [
    (['--config', 'no.py'], 'there is no config no.py'),
    (['--student', 'no.py'], 'there is no config no.py'),
    (['--batch-size', '0'], '--batch-size must be at least 1'),
    (['--size', '100'], '--size must be a multiple of 32, but is 100'),
    (['--device', 'abacus'], '--device abacus cannot be used: '),
    (['--out', 'no/folder.json'], '--out no/folder.json is a folder, or in a folder that does not'),
])
def test_wrong_arguments_end_in_one_sentence(benchmark, arguments, message):
    with pytest.raises(SystemExit) as caught:
        benchmark(*arguments)
    assert caught.value.code.startswith('train_overhead.py: ')
    assert message in caught.value.code and '\n' not in caught.value.code
