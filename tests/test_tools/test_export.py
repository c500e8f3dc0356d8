# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The commands of docs/deployment.md, and what goes wrong."""
import re
import shlex
import shutil
import sys

import pytest
import torch
from mmengine.config import Config
from pruning_samples import randomise
from scripts import ROOT, complaint_of, output_of
from tiers import slow_except

from mmgcp.deployment import open_exported
from mmgcp.utils.config import build_detector

PAGE = (ROOT / 'docs' / 'deployment.md').read_text()
COMMANDS = [' '.join(block.replace('\\\n', ' ').split()) for block in re.findall(
    r'^python tools/export\.py (.*?[^\\])\n', PAGE, re.M | re.S)]
SMALL = ('--cfg-options', 'model.test_cfg.nms_pre=100', 'model.test_cfg.max_per_img=20')
NEEDED = {'.xml': ['openvino'], '.param': ['pnnx', 'ncnn']}


@pytest.fixture(scope='module')
def folder(modules, write_config, pruned_folder, tmp_path_factory):
    """A folder with pruned/pruned.py and .pth, and an original with data beside them."""
    folder = tmp_path_factory.mktemp('export')
    shutil.copytree(str(pruned_folder), str(folder / 'pruned'))
    config = write_config(folder / 'my_yolov4.py')
    model = randomise(build_detector(Config.fromfile(str(config))))
    torch.save(dict(state_dict=model.state_dict()), str(folder / 'my_yolov4.pth'))
    return folder


def test_commands_are_found():
    assert len(COMMANDS) >= 6 and all('pruned/pruned.py' in command or 'my_yolov4.py' in command
                                      for command in COMMANDS)


@pytest.mark.parametrize('command', slow_except(COMMANDS[:2], COMMANDS, pytest.mark.slow))
def test_commands_of_the_documentation(command, folder):
    arguments = shlex.split(command)
    out = next(item for item in arguments if item.split('.')[-1] in ('onnx', 'xml', 'param'))
    for package in NEEDED.get(f'.{out.split(".")[-1]}', ()):
        pytest.importorskip(package)
    more = ['--input-size', 64, 64] if '--input-size' not in arguments else []
    if 'my_yolov4.py' in arguments:
        more = []  # with data of 96 pixels
    if '--cfg-options' not in arguments:
        more += SMALL
    printed = output_of('export.py', *arguments, *more, cwd=folder)
    assert f'written to {out}' in printed
    difference = re.search(r'largest difference from PyTorch: (\S+)\n', printed).group(1)
    assert float(difference) < 1e-4
    exported = open_exported(folder / out)
    assert exported.metadata['outputs'] == ('detections' if '--nms' in arguments else 'raw')
    if '--int8' in arguments:
        assert (folder / out.replace('.onnx', '-int8.onnx')).is_file()
        assert 'pascal_voc/mAP on at most' in printed and '-int8.onnx 0.' in printed


def test_metadata(folder):
    output_of('export.py', 'pruned/pruned.py', 'pruned/pruned.pth', 'meta.onnx', '--input-size', 96,
              64, cwd=folder)
    metadata = open_exported(folder / 'meta.onnx').metadata
    assert metadata['classes'] == ['Platelets', 'RBC', 'WBC']
    assert metadata['input_size'] == [96, 64] and metadata['std'] == [255.] * 3
    assert metadata['color_order'] == 'RGB'


def test_input_size_of_the_test_images(folder):
    output_of('export.py', 'my_yolov4.py', 'my_yolov4.pth', 'size.onnx', cwd=folder)
    assert open_exported(folder / 'size.onnx').input_shape == (1, 3, 96, 96)


PRUNED = ('pruned/pruned.py', 'pruned/pruned.pth')


@pytest.mark.parametrize('arguments, reason', [
    ((*PRUNED, 'a.pt'), 'the name of the file has to end in .onnx, but is a.pt'),
    ((*PRUNED, 'nowhere/a.onnx'), 'there is no folder nowhere'),
    ((*PRUNED, 'a.onnx', '--input-size', 64, 70),
     'the size of the images has to be a multiple of 32, but is 64 x 70'),
    ((*PRUNED, 'a.onnx', '--nms', '--cfg-options', 'model.test_cfg.nms.type=soft_nms'),
     "only test_cfg.nms=dict(type='nms', iou_threshold=...) can be in the file"),
    (('pruned/pruned.py', 'absent.pth', 'a.onnx'), 'there is no checkpoint absent.pth'),
])
def test_wrong_requests(folder, arguments, reason):
    assert reason in complaint_of('export.py', *arguments, cwd=folder)
    assert not (folder / 'a.onnx').exists()


def test_file_that_differs_is_not_kept(folder):
    (folder / 'old.onnx').write_text('as it was')
    message = complaint_of('export.py', *PRUNED, 'old.onnx', '--input-size', 64, 64,
                           '--tolerance', 1e-12, cwd=folder)
    assert re.search(r'the file is \S+ from what PyTorch computes, more than the tolerance 1e-12: '
                     'it has not been kept$', message)
    assert (folder / 'old.onnx').read_text() == 'as it was'
    assert not list(folder.glob('.*old*'))


@pytest.mark.parametrize('missing, options, reason', [
    ('onnx', [], 'onnx is needed to write such files: pip install onnx'),
    ('onnxruntime', ['--int8'], 'onnxruntime is needed for int8: pip install onnxruntime')])
def test_without_a_package(folder, monkeypatch, missing, options, reason):
    monkeypatch.setitem(sys.modules, missing, None)
    message = complaint_of('export.py', *PRUNED, 'a.onnx', *options, cwd=folder)
    assert message == f'export.py: {reason}' and not (folder / 'a.onnx').exists()


def test_without_anything_to_run_the_file(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    printed = output_of('export.py', *PRUNED, 'alone.onnx', '--input-size', 64, 64, cwd=folder)
    assert printed.splitlines()[-2:] == [
        'not compared with PyTorch: that needs onnxruntime (pip install onnxruntime)',
        'written to alone.onnx']
