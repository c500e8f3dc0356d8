# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The two tools, as they are called."""
import re

import numpy as np
import pytest
import torch
from darknet_samples import READ, SIZE, WRITE
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from scripts import complaint, complaint_of, output_of, run_process

from mmgcp.darknet import class_names


@pytest.fixture(scope='module')
def converted(tiny_files, tmp_path_factory):
    """A converted network, by a real process."""
    folder = tmp_path_factory.mktemp('converted')
    (folder / 'abc.names').write_text('cell a\nb\n\nc\n')
    result = run_process(READ, *tiny_files, folder / 'tiny.pth', '--names', folder / 'abc.names')
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_there(converted):
    folder, output = converted
    assert 'all 82 of 82 convolutions found' in output
    assert sorted(path.name for path in folder.iterdir()) == [
        'abc.names', 'tiny.pth', 'tiny.py']
    config = Config.fromfile(folder / 'tiny.py')
    assert config.model.backbone.norm_cfg.eps == 1e-5
    scales = [step.scale for step in config.test_pipeline if 'scale' in step]
    assert [tuple(scale) for scale in scales] == [SIZE, SIZE]
    assert config.train_dataloader.dataset.pipeline[2].img_scale == SIZE
    assert '640' not in str(config.train_dataloader) + str(config.test_dataloader)
    assert config.img_scale == SIZE and 'anchors' not in config


def test_inference(converted, tiny_model):
    folder, _ = converted
    detector = init_detector(str(folder / 'tiny.py'), str(folder / 'tiny.pth'), device='cpu')
    assert detector.dataset_meta['classes'] == ('cell a', 'b', 'c')
    image = np.random.RandomState(0).randint(0, 255, (48, 70, 3), dtype=np.uint8)
    result = inference_detector(detector, image)
    assert len(result.pred_instances) > 0
    inputs = torch.rand(1, 3, SIZE[1], SIZE[0])
    with torch.no_grad():
        outputs = [model(inputs, mode='tensor') for model in (detector, tiny_model)]
    for ours, theirs in zip(*(sum(map(list, output), []) for output in outputs)):
        assert torch.equal(ours, theirs)


def test_and_back(converted, tiny_files, tmp_path):
    folder, _ = converted
    out = tmp_path / 'again.v2'
    assert 'Wrote' in output_of(WRITE, folder / 'tiny.py', folder / 'tiny.pth', out)
    cfg, weights = tiny_files
    assert (tmp_path / 'again.v2.cfg').read_text() == cfg.read_text()
    assert (tmp_path / 'again.v2.weights').read_bytes() == weights.read_bytes()
    assert (tmp_path / 'again.v2.names').read_text() == 'cell a\nb\nc\n'
    assert len(list(tmp_path.iterdir())) == 3


def test_partial_weights(tiny_files, tmp_path):
    cfg, weights = tiny_files
    partial = tmp_path / 'stem.conv'
    partial.write_bytes(weights.read_bytes()[:20 + 4 * 8 * (4 + 27)])
    output = output_of(READ, cfg, partial, tmp_path / 'stem.pth')
    assert ('PARTIAL, the first 1 of 82 convolutions found (Darknet layers 0 to 0 of '
            in output)
    content = torch.load(tmp_path / 'stem.pth')
    assert content['meta']['dataset_meta']['classes'] == ('class_0', 'class_1', 'class_2')
    assert {key.rsplit('.', 2)[0] for key in content['state_dict']} == {'backbone.stem'}


def test_error_of_a_process(tmp_path):
    """No traceback, and nothing written."""
    (tmp_path / 'v3.cfg').write_text('[net]\n[convolutional]\nbatch_normalize=1\nfilters=32\n'
                                     'size=3\nstride=1\npad=1\nactivation=leaky\n')
    (tmp_path / 'v3.weights').write_bytes(bytes(100))
    result = run_process(READ, 'v3.cfg', 'v3.weights', 'v3.pth', cwd=tmp_path)
    assert not result.stdout
    assert complaint(result) == (
        'darknet_to_mmgcp.py: v3.cfg: not a YOLOv4 network: layer 0, [convolutional] in line 2, '
        'should have activation=mish, but has activation=leaky')
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_of_darknet_to_mmgcp(tiny_files, tmp_path):
    cfg, weights = tiny_files
    out = tmp_path / 'out.pth'
    broken, names = tmp_path / 'broken.weights', tmp_path / 'two.names'
    broken.write_bytes(weights.read_bytes() + b'abc')
    names.write_text('a\nb\n')
    for args, message in [
        ((tmp_path / 'no.cfg', weights, out), 'the cfg file .*no.cfg does not exist'),
        ((cfg, tmp_path / 'no.weights', out), 'the weights file .* does not exist'),
        ((weights, weights, out), 'is not a Darknet cfg'),
        ((cfg, broken, out), 'has 3 bytes left over after the last layer'),
        ((cfg, weights, tmp_path / 'no' / 'out.pth'), 'the output folder .* does not exist'),
        ((cfg, weights, tmp_path / 'out'), r'must end in \.pth'),
        ((cfg, weights, out, '--names', names), 'has 2 names, but the network has 3 classes'),
        ((cfg, weights, out, '--names', tmp_path / 'no'), 'the names file .* does not exist'),
    ]:
        assert re.search(message, complaint_of(READ, *args))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken.weights', 'two.names']


def test_errors_of_mmgcp_to_darknet(converted, tmp_path):
    folder, _ = converted
    config, ckpt = folder / 'tiny.py', folder / 'tiny.pth'
    other = tmp_path / 'yolov5.py'
    other.write_text("_base_ = 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'\n")
    broken, lacking = tmp_path / 'broken.pth', tmp_path / 'lacking.pth'
    broken.write_bytes(b'nothing')
    torch.save(dict(state_dict=dict()), lacking)
    syntax = tmp_path / 'syntax.py'
    syntax.write_text('model = (')
    before = len(list(tmp_path.iterdir()))
    out = tmp_path / 'out'
    for args, message in [
        ((tmp_path / 'no.py', ckpt, out), 'there is no config .*no.py'),
        ((config, tmp_path / 'no.pth', out), 'there is no checkpoint .*no.pth'),
        ((config, ckpt, tmp_path / 'no' / 'out'), 'the output folder .* does not exist'),
        ((other, ckpt, out), 'not YOLOv4: its backbone is a YOLOv5CSPDarknet'),
        ((config, broken, out), 'cannot be read as a checkpoint'),
        ((config, lacking, out), r'does not fit .*tiny.py: \d+ missing \(backbone.stem'),
        ((syntax, ckpt, out), 'cannot be read: SyntaxError'),
        ((config, ckpt, out, '--input-size', 100, 64), '100x64 is not a multiple of 32'),
    ]:
        assert re.search(message, complaint_of(WRITE, *args))
    assert len(list(tmp_path.iterdir())) == before


def test_class_names():
    assert len(class_names(80)) == 80 and class_names(80)[0] == 'person'
    assert len(class_names(20)) == 20 and class_names(20)[0] == 'aeroplane'
    assert class_names(2) == ('class_0', 'class_1')
