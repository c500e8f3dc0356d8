# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from scripts import complaint, complaint_of, output_of, run_process

from mmgcp.pipeline.summary import choose_metrics


def test_metrics(trained, tmp_path):
    checkpoint = trained['work_dir'] / 'epoch_1.pth'
    result = run_process('test.py', trained['config'], checkpoint, '--work-dir', 'out',
                         cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (path, ) = (tmp_path / 'out').glob('*/*.json')
    metrics = json.loads(path.read_text())
    names = {f'pascal_voc/AP{percent}' for percent in range(50, 100, 5)} | {'pascal_voc/mAP'}
    assert names <= set(metrics)
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert json.loads((tmp_path / 'out' / 'metrics.json').read_text()) == pytest.approx(metrics)
    # of a table of all the classes in the log
    assert all(f'| {name} ' in result.stdout for name in ('cross', 'disc', 'triangle'))


def write_coco(cfg, path):
    """Annotations of the images to test on in COCO's form: a box in the middle of each."""
    with DefaultScope.overwrite_default_scope('mmyolo'):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    ids = [dataset.get_data_info(index)['img_id'] for index in range(len(dataset))]
    path.write_text(json.dumps(dict(
        images=[dict(id=key, width=128, height=128) for key in ids],
        categories=[dict(id=number, name=name)
                    for number, name in enumerate(dataset.metainfo['classes'])],
        annotations=[dict(id=number, image_id=key, category_id=0, bbox=[40, 40, 48, 48],
                          area=48**2, iscrowd=0) for number, key in enumerate(ids, 1)])))


@pytest.mark.parametrize('evaluator', ['coco', 'voc'])
def test_detector_that_finds_nothing_has_the_accuracy_0(trained, tmp_path, evaluator):
    """Also in the summary of tools/compress.py, which reads what test.py wrote."""
    write_coco(Config.fromfile(trained['config']), tmp_path / 'truth.json')
    text = f"_base_ = {str(trained['config'])!r}\nmodel = dict(test_cfg=dict(score_thr=1.))\n"
    if evaluator == 'coco':
        text += ("test_evaluator = dict(_delete_=True, type='mmdet.CocoMetric', metric='bbox', "
                 f"ann_file={str(tmp_path / 'truth.json')!r})\n")
    (tmp_path / 'blind.py').write_text(text)
    output_of('test.py', tmp_path / 'blind.py', trained['work_dir'] / 'epoch_1.pth',
              '--work-dir', 'out', cwd=tmp_path)
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert choose_metrics(metrics) == dict(mAP50=0., mAP=0.)


def test_missing_config(tmp_path):
    message = complaint_of('test.py', 'nowhere.py', 'any.pth', cwd=tmp_path)
    assert message == 'test.py: there is no config nowhere.py'
    assert not list(tmp_path.iterdir())


def test_missing_checkpoint(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    result = run_process('test.py', config, 'nowhere.pth', cwd=tmp_path)
    assert complaint(result) == 'test.py: there is no checkpoint nowhere.pth'
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


@pytest.mark.parametrize('content', [b'', b'no checkpoint\n'])
def test_faulty_checkpoint(write_config, tmp_path, content):
    config = write_config(tmp_path / 'tiny.py')
    (tmp_path / 'faulty.pth').write_bytes(content)
    message = complaint_of('test.py', config, 'faulty.pth', cwd=tmp_path)
    assert message.startswith('test.py: faulty.pth cannot be read as a checkpoint: ')
    assert not (tmp_path / 'work_dirs').exists()


def test_checkpoint_of_another_architecture(trained, write_config, tmp_path):
    config = write_config(tmp_path / 'wide.py', widen_factor=0.25)
    message = complaint_of('test.py', config, trained['work_dir'] / 'epoch_1.pth', cwd=tmp_path)
    assert message.startswith('test.py: the checkpoint ')
    assert f'does not fit {config}: ' in message and ' mismatched (' in message
    assert [path.name for path in tmp_path.iterdir()] == ['wide.py']


def test_cfg_options_count_for_the_check(trained, write_config, tmp_path):
    """A checkpoint is compared with the model after --cfg-options."""
    message = complaint_of('test.py', trained['config'], trained['work_dir'] / 'epoch_1.pth',
                           '--cfg-options', 'model.bbox_head.head_module.num_classes=2',
                           cwd=tmp_path)
    assert '6 mismatched (bbox_head.head_module.convs_pred.0.weight' in message
