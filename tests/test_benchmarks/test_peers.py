# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The comparison with peers: its rows, its data, what it runs, and its tables."""
import copy
import json
import sys
from xml.etree import ElementTree

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from pruning_samples import Toy, randomise

from mmgcp.datasets.demo import CLASSES
from mmgcp.errors import UserError
from mmgcp.pruning.scores import criterion_names
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.config import build_detector, load_config


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark('peers.py')


@pytest.fixture
def module(benchmark):
    """A function that returns one of the modules beside the script."""
    return lambda name: sys.modules[f'peers_{name}']


@pytest.fixture
def detector(write_config, tmp_path):
    """Config and checkpoint of a tiny detector."""
    config = write_config(tmp_path / 'tiny.py')
    model = randomise(build_detector(load_config(str(config))))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'tiny.pth')
    return config, tmp_path / 'tiny.pth'


@pytest.fixture
def annotated(demo_root, tmp_path):
    """The demo's training images as an argument: annotations in COCO's format, and the folder."""
    photographs, boxes = [], []
    names = (demo_root / 'ImageSets' / 'Main' / 'trainval.txt').read_text().split()
    for number, name in enumerate(names):
        photographs.append(dict(id=number, file_name=f'{name}.jpg', width=128, height=128))
        for item in ElementTree.parse(demo_root / 'Annotations' / f'{name}.xml').iter('object'):
            left, top, right, bottom = (float(item.find(f'bndbox/{side}').text)
                                        for side in ('xmin', 'ymin', 'xmax', 'ymax'))
            boxes.append(dict(
                id=len(boxes) + 1, image_id=number, iscrowd=0,
                category_id=CLASSES.index(item.find('name').text),
                bbox=[left, top, right - left, bottom - top],
                area=(right - left) * (bottom - top)))
    path = tmp_path / 'boxes.json'
    path.write_text(json.dumps(dict(
        images=photographs, annotations=boxes,
        categories=[dict(id=index, name=name) for index, name in enumerate(CLASSES)])))
    return f'{path}:{demo_root / "JPEGImages"}'


def table(printed):
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in printed.splitlines() if line.startswith('|')]


@pytest.mark.slow
def test_comparison(benchmark, detector, annotated, tmp_path, capsys, monkeypatch):
    """A real one, with a peer that is not there; what is finished is not run again."""
    monkeypatch.setitem(sys.modules, 'mmrazor', None)  # as if it were not installed
    monkeypatch.setattr(sys.modules['peers_pruning'], 'STEPS', 5)
    arguments = (
        *detector, '--work-dir', tmp_path / 'work', '--calibration', annotated, '--train',
        annotated, annotated, '--val', annotated, '--size', 64, '--batch-size', 6,
        '--calib-batches', 1, '--rows', 'dense', 'plain', 'tp-taylor-local-bn',
        'tp-taylor-local-bn-recovered', 'mmrazor-l1',
        '--variant', 'plain=criterion.type=mmgcp.L1Norm compensate=False', '--remove', 0.3,
        '--epochs', 1, '--seeds', 0, 1, '--plot', tmp_path / 'plot.png')
    benchmark(*arguments)
    printed = capsys.readouterr().out
    rows = table(printed)
    assert rows[0] == ['-30% of the MACs', 'MACs', 'parameters', 'right away', 'after 1 epochs']
    assert [row[0] for row in rows[2:]] == [
        'not pruned', 'mmgcp, plain',
        'Torch-Pruning, GroupTaylorImportance, local, recalibrated BN',
        'Torch-Pruning, GroupTaylorImportance, local, recalibrated BN, recovered as mmgcp',
        'MMRazor, L1 [1]']
    assert 'MMRazor, L1, -30%: ModuleNotFoundError: ' in printed
    for row in rows[3:5]:
        assert 27 < -float(row[1].strip('%')) < 33
    for row in rows[2:6]:
        assert ' to ' not in row[3] and ' to ' in row[4]  # of one pruning, of two seeds
    assert (tmp_path / 'plot.png').stat().st_size > 10000

    results = {path.parent.name: json.loads(path.read_text())
               for path in (tmp_path / 'work').glob('*/result.json')}
    assert set(results) == {
        'dense-0-0', 'dense-0-0-1epochs', 'dense-0-1-1epochs', 'plain-0.3-0',
        'plain-0.3-0-1epochs', 'plain-0.3-1-1epochs', 'tp-taylor-local-bn-0.3-0',
        'tp-taylor-local-bn-0.3-0-1epochs', 'tp-taylor-local-bn-0.3-1-1epochs',
        'tp-taylor-local-bn-recovered-0.3-0', 'tp-taylor-local-bn-recovered-0.3-0-1epochs',
        'tp-taylor-local-bn-recovered-0.3-1-1epochs',
        'mmrazor-l1-0.3-0-failed', 'mmrazor-l1-0.3-1-failed'}
    monkeypatch.setattr(sys.modules['peers_runs'], 'train', None)
    monkeypatch.setattr(sys.modules['peers_runs'], 'recover', None)
    monkeypatch.setitem(sys.modules['peers_runs'].PRUNERS, 'mmgcp', None)
    benchmark(*arguments)
    assert table(capsys.readouterr().out) == rows


def test_pruned_once(benchmark, detector, annotated, tmp_path, monkeypatch, module):
    """A later start with more epochs trains what an earlier one has pruned."""
    arguments = (*detector, '--work-dir', tmp_path / 'work', '--calibration', annotated, '--size',
                 64, '--calib-batches', 1, '--rows', 'default', '--remove', 0.3, '--seeds', 0,
                 '--prune-options', 'criterion.type=mmgcp.L1Norm', '--epochs')
    trained = []
    monkeypatch.setattr(module('runs'), 'train',
                        lambda model, *_: trained.append(copy.deepcopy(model)) or [1.])
    monkeypatch.setattr(module('runs'), 'evaluate', lambda model, cfg: ('coco/mAP', 0.2))
    benchmark(*arguments, 1)
    monkeypatch.setitem(module('runs').PRUNERS, 'mmgcp', None)
    benchmark(*arguments, 1, 2)
    first, second = (model.state_dict() for model in trained)
    assert list(first) == list(second)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    monkeypatch.setitem(module('runs').PRUNERS, 'mmgcp', module('pruning').prune_with_mmgcp)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # another one is pruned, and that is interrupted
        patch.setattr(module('runs'), 'evaluate', fail)
        with pytest.raises(SystemExit):
            benchmark(*arguments, 1, '--cfg-options', 'a=1')
    benchmark(*arguments, 3)
    assert len(trained) == 3


def test_epochs_before_pruning_count(benchmark, detector, annotated, tmp_path, capsys, monkeypatch,
                                     module):
    """Of the three stages, whose pruned network a teacher trains; both runs of a seed agree."""
    trained = []

    def fake_train(model, cfg, epochs, lr, seed, hooks=()):
        trained.append((type(model).__name__, epochs, [hook['type'] for hook in hooks]))
        return [1.] * epochs

    def fake_evaluate(model, cfg):
        return 'coco/mAP', 0.1 * trained[-1][1] if trained else 0.2

    monkeypatch.setattr(module('runs'), 'train', fake_train)
    monkeypatch.setattr(module('runs'), 'evaluate', fake_evaluate)
    benchmark(*detector, '--work-dir', tmp_path / 'work', '--size', 64, '--calib-batches', 1,
              '--rows', 'stages', 'slimming', 'dense', '--remove', 0.3, '--also-remove', 0.1,
              '--epochs', 2, 5, 7, '--first-epochs', 2, '--seeds', 3, '--sparsity-rate', 0.5)
    hook = ['mmgcp.DynamicSparsityHook']
    assert trained == [
        *(('YOLODetector', epochs, []) for epochs in (2, 5, 7)),
        ('YOLODetector', 2, hook),
        *(('SpatialAttentionDistiller', epochs, []) for epochs in (3, 5)),
        ('YOLODetector', 2, hook), *(('YOLODetector', epochs, []) for epochs in (3, 5))]
    rows = table(capsys.readouterr().out)
    assert rows[0][0] == '-10% of the MACs' and rows[3][3:] == ['-', '0.200, 100%', '-', '-']
    rows = rows[5:]
    assert rows[0][0] == '-30% of the MACs' and rows[2][:2] == ['not pruned', '+0.0%']
    assert rows[2][3:] == ['0.200, 100%', '0.200, 100%', '0.500, 100%', '0.700, 100%']
    assert rows[3][0] == 'mmgcp, three stages (pruned after 2 epochs)'
    # Right after pruning two epochs have been spent
    assert rows[3][3:] == ['-', '0.200, 100%', '0.300, 60%', '0.500, 71%']


def test_epochs_between_steps_count(benchmark, detector, annotated, tmp_path, capsys, monkeypatch,
                                    module):
    """The network is recovered after the first step, and for the rest of the epochs at last."""
    recovered = []
    monkeypatch.setattr(module('runs'), 'recover',
                        lambda student, teacher, images, steps: recovered.append(
                            steps / len(images)))
    monkeypatch.setattr(module('runs'), 'evaluate', lambda model, cfg: ('coco/mAP', 0.2))
    benchmark(*detector, '--work-dir', tmp_path / 'work', '--size', 64, '--calib-batches', 1,
              '--train', annotated, '--rows', 'recovered-2-steps', '--remove', 0.3, '--seeds', 0,
              '--epochs', 4, 7, '--prune-options', 'criterion.type=mmgcp.L1Norm compensate=False')
    assert recovered == [5, 2]
    rows = table(capsys.readouterr().out)
    assert rows[0][3:] == ['right away', 'after 4 epochs', 'after 7 epochs']
    assert rows[-1][0] == 'mmgcp, in 2 steps, recovered after each (pruned after 5 epochs)'
    assert rows[-1][3:] == ['-', '-', '0.200']


def test_seeds_of_recovery(benchmark, detector, annotated, tmp_path, monkeypatch, module):
    """They decide the order of the batches, which the first one leaves as it is."""
    orders = []
    monkeypatch.setattr(module('runs'), 'recover',
                        lambda student, teacher, images, steps: orders.append(
                            [float(batch.mean()) for batch in images]))
    monkeypatch.setattr(module('runs'), 'evaluate', lambda model, cfg: ('coco/mAP', 0.2))
    monkeypatch.setattr(module('runs'), 'CALIBRATION_BATCH', 1)
    arguments = (*detector, '--size', 64, '--calib-batches', 1, '--train', annotated, '--rows',
                 'recovered', '--remove', 0.3, '--epochs', 1, '--prune-options',
                 'criterion.type=mmgcp.L1Norm compensate=False')
    benchmark(*arguments, '--work-dir', tmp_path / 'work', '--seeds', 0, 1, 2)
    benchmark(*arguments, '--work-dir', tmp_path / 'again', '--seeds', 1)
    assert len(orders) == 4 and orders[3] == orders[1]
    assert len(orders[0]) > 2 and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_rows(module):
    rows = module('rows').all_rows(dict(round_to=8), dict(mine=dict(round_to=4, ratio=0.1)))
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and names[:3] == ['dense', 'default', 'mine']
    assert {f'criterion-{name}' for name in criterion_names()} < set(names)
    options = {row.name: row.options for row in rows}
    assert options['default'] == dict(round_to=8)
    assert options['mine'] == dict(round_to=4, ratio=0.1)
    assert options['criterion-APoZ'] == dict(round_to=8, criterion=dict(type='mmgcp.APoZ'))
    others = {f'criterion-{name}' for name in criterion_names()  # which other tests have registered
              if not TASK_UTILS.get(f'mmgcp.{name}').__module__.startswith('mmgcp.')}
    assert {row.name for row in rows if row.has_chance} - others == {
        f'criterion-{name}' for name in ('DCP', 'LCP', 'Random', 'ThiNet')}
    select = module('rows').select
    assert [row.name for row in select(rows, ['tp-taylor-*', 'dense'])] == [
        'dense', *(f'tp-taylor-{scope}' for scope in (
            'local', 'local-bn', 'local-bn-recovered',
            'global', 'global-bn', 'global-bn-recovered'))]
    with pytest.raises(UserError, match='no row is called guess; there are dense, '):
        select(rows, ['dense', 'guess'])


def test_options_on_the_command_line(module):
    read = module('rows').read_options
    assert read("criterion.type=mmgcp.L1Norm criterion.a=1 compensate=False "
                "groups=[{'name':'all','modules':['*']}]") == dict(
        criterion=dict(type='mmgcp.L1Norm', a=1), compensate=False,
        groups=[dict(name='all', modules=['*'])])
    assert module('rows').read_variant('a=ratio=0.5') == ('a', dict(ratio=0.5))


@pytest.mark.parametrize('arguments, message', [
    (('--prune-options', 'ratio'), 'expected KEY=VALUE, but got ratio'),
    (('--variant', 'a/b=ratio=1'), "expected NAME='KEY=VALUE ...', but got a/b=ratio=1"),
    (('--val', 'boxes.json'), 'ANNOTATIONS:FOLDER, but got boxes.json'),
])
def test_faulty_arguments(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark('config.py', 'checkpoint.pth', *arguments)
    assert message in capsys.readouterr().err


def test_nothing_to_report(benchmark, detector, tmp_path):
    with pytest.raises(SystemExit, match='was measured with these settings'):
        benchmark(*detector, '--work-dir', tmp_path, '--report')


def test_share_out_of_range(benchmark):
    with pytest.raises(SystemExit, match='must be in'):
        benchmark('config.py', 'checkpoint.pth', '--remove', 30)


def test_data(module, detector, annotated):
    """Images have their size in both pipelines, and the classes are the detector's."""
    data = module('data')
    cfg, source = load_config(str(detector[0])), data.images(annotated)
    before = copy.deepcopy(cfg.to_dict())
    changed = data.with_test_data(
        data.with_training_data(cfg, [source], 32, 5, augmented=True), source, 64, 3)
    assert cfg.to_dict() == before
    dataset = changed.train_dataloader.dataset
    mosaic, affine = (next(step for step in dataset.pipeline if step.type == kind)
                      for kind in ('Mosaic', 'YOLOv5RandomAffine'))
    assert mosaic.img_scale == (32, 32) and affine.border == (-16, -16)
    assert dataset.ann_file == source.annotations and dataset.metainfo.classes == CLASSES
    assert changed.train_dataloader.batch_size == 5
    tested = changed.val_dataloader.dataset
    assert tested.test_mode and tested.pipeline[1].scale == (64, 64)
    assert changed.val_evaluator.ann_file == source.annotations
    several = data.with_training_data(cfg, [source] * 2, 32, 5, True).train_dataloader.dataset
    assert several.type == 'ConcatDataset' and several.datasets == [dataset, dataset]
    with pytest.raises(UserError, match='no train_dataloader'):
        data.with_training_data(Config(dict(model={})), [source], 32, 5, False)


def test_images_are_kept_without_their_data_set(module):
    """Copies of what is kept would have copies of all that is kept, and take ever longer."""
    transform = module('data').Remembered([])
    first = transform.transform(dict(img_path='a.jpg', dataset=transform, size=[1, 2]))
    assert first == dict(img_path='a.jpg', size=[1, 2])
    first['size'].append(3)
    assert transform.transform(dict(img_path='a.jpg', dataset=transform))['size'] == [1, 2]


def test_recalibrated_statistics(module):
    """They are those of the images: means over the batches, each of its own size."""
    model = Toy(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(3, momentum=0.03)).eval()
    batches = [torch.rand(4, 3, 5, 5), 3 * torch.rand(4, 3, 5, 5)]
    module('pruning').recalibrate(model, batches)
    torch.testing.assert_close(
        model.norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(
        model.norm.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert model.norm.momentum == 0.03 and not model.norm.training


def test_budget_is_met_as_closely_as_possible(module, monkeypatch):
    pruning = module('pruning')
    monkeypatch.setattr(pruning, 'count_complexity', lambda model, shape: (0, model))
    task = pruning.Task(1000, None, 0.3, (3, 8, 8), [], {})
    assert pruning.meet_budget(lambda ratio: round(1000 * (1 - ratio)**2), task) == 700
    # Nearer above than below
    assert pruning.meet_budget(lambda ratio: 720 if ratio < 0.4 else 650, task) == 720
    with pytest.raises(UserError, match='no pruning ratio removes 30% of the MACs'):
        pruning.meet_budget(lambda ratio: 900, task)


def test_parameters_instead_of_macs(benchmark, detector, annotated, tmp_path, capsys, monkeypatch,
                                    module):
    """This project and a peer meet a budget of parameters; results of the two are told apart."""
    monkeypatch.setattr(module('pruning'), 'STEPS', 7)
    monkeypatch.setattr(module('runs'), 'evaluate', lambda model, cfg: ('coco/mAP', 0.2))
    arguments = (*detector, '--work-dir', tmp_path / 'work', '--calibration', annotated, '--size',
                 64, '--calib-batches', 1, '--rows', 'default', 'tp-magnitude-local', '--remove',
                 0.4, '--seeds', 0, '--prune-options',
                 'criterion.type=mmgcp.L1Norm compensate=False', '--epochs', '--of')
    for of in ('parameters', 'MACs'):
        benchmark(*arguments, of)
        rows = table(capsys.readouterr().out)
        assert rows[0][0] == f'-40% of the {of}'
        before = float(rows[2][2].split()[0])
        for row in rows[3:]:
            parameters = float(row[2].split()[0]) / before - 1
            left = parameters if of == 'parameters' else float(row[1].strip('%')) / 100
            assert left == pytest.approx(-0.4, abs=0.03), row
    monkeypatch.setitem(module('runs').PRUNERS, 'mmgcp', None)
    for of in ('parameters', 'MACs'):  # each has results of its own, and prunes no more
        benchmark(*arguments, of)


def test_points_of_other_machines(benchmark, detector, annotated, tmp_path, monkeypatch, module):
    """They stay in the file, unless they have been measured anew, and are plotted."""
    monkeypatch.setattr(module('runs'), 'train', lambda *_: [1.])
    monkeypatch.setattr(module('runs'), 'evaluate', lambda model, cfg: ('coco/mAP', 0.25))
    path, drawn = tmp_path / 'points.json', []
    arguments = (*detector, '--work-dir', tmp_path / 'work', '--calibration', annotated, '--size',
                 64, '--calib-batches', 1, '--rows', 'default', 'slimming-dense', '--remove', 0.3,
                 '--seeds', 0, '--epochs', 2, '--points', path, '--prune-options',
                 'criterion.type=mmgcp.L1Norm compensate=False')
    benchmark(*arguments)
    found = json.loads(path.read_text())
    points = {tuple(point[:3]): point[3:] for point in found['points']}
    assert set(points) == {('dense', 0, 0), *(
        (row, 0.3, epochs) for row in ('default', 'slimming-dense') for epochs in (0, 2))}
    for (_, share, _), (removed, accuracy) in points.items():
        assert removed == pytest.approx(100 * share, abs=3) and accuracy == 0.25
    found['points'] = [['default', 0.3, 2, 31, 0.1], ['default', 0.5, 2, 50, 0.2],
                       ['dense', 0, 2, 0, 0.7], ['recovered', 0.3, 2, 30, 0.6]]
    path.write_text(json.dumps(found))
    monkeypatch.setattr(module('plot').FigureCanvasAgg, 'print_figure',
                        lambda canvas, name, **_: drawn.append(canvas.figure))
    benchmark(*arguments, '--plot', tmp_path / 'plot.png')
    after = drawn[0].axes[1]
    assert after.get_title() == 'after 2 epochs'
    lines = {line.get_label(): line.get_xydata().tolist() for line in after.lines}
    assert lines['mmgcp'] == [points['default', 0.3, 2], [50, 0.2]]
    assert [y for _, y in lines['not pruned']] == [0.7, 0.7]
    assert 'mmgcp, recovered' not in lines  # --rows does not ask for it
    merged = {tuple(point[:3]): point[3:] for point in json.loads(path.read_text())['points']}
    assert merged == {**points, ('default', 0.5, 2): [50, 0.2], ('dense', 0, 2): [0, 0.7],
                      ('recovered', 0.3, 2): [30, 0.6]}
    with pytest.raises(SystemExit, match='points.json has points with size=64, but these runs are '
                                         'with size=96'):
        benchmark(*arguments, '--size', 96)
    assert json.loads(path.read_text())['points'] == sorted(map(list, [
        (*key, *value) for key, value in merged.items()]))


def test_gradients_of_the_loss(module, monkeypatch):
    """They are summed over the batches, and none is left behind."""
    model = Toy(lambda net, x: net.pred(x), pred=nn.Conv2d(1, 1, 1))
    monkeypatch.setattr(module('pruning'), 'detection_loss', lambda model, x: model(x).sum())
    gradients = module('pruning').loss_gradients(
        model, [torch.full((1, 1, 2, 2), 3.), torch.ones(1, 1, 2, 2)])
    assert gradients['pred.weight'].item() == 16 and gradients['pred.bias'].item() == 8
    assert model.pred.weight.grad is None
