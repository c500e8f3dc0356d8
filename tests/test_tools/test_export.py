# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The commands of docs/deployment.md, and what goes wrong."""
import importlib.util
import re
import shlex

import pytest
from scripts import ROOT, complaint_of, output_of, run_code

from mmgcp.deployment import open_exported
from mmgcp.deployment.exported import is_installed

PAGE = (ROOT / 'docs' / 'deployment.md').read_text()
COMMANDS = [' '.join(block.replace('\\\n', ' ').split()) for block in re.findall(
    r'^python tools/export\.py (.*?[^\\])\n', PAGE, re.M | re.S)]
SMALL = ('--cfg-options', 'model.test_cfg.nms_pre=100', 'model.test_cfg.max_per_img=20')
NEEDED = {'.xml': ['openvino'], '.param': ['pnnx', 'ncnn']}


@pytest.fixture(scope='module')
def folder(modules, write_config, pruned_folder, tmp_path_factory):
    """A folder with pruned/pruned.py and .pth, and an original with data beside them."""
    import shutil

    import torch
    from mmengine.config import Config
    from pruning_samples import randomise

    from mmgcp.utils.config import build_detector
    folder = tmp_path_factory.mktemp('export')
    shutil.copytree(str(pruned_folder), str(folder / 'pruned'))
    config = write_config(folder / 'my_yolov4.py')
    model = randomise(build_detector(Config.fromfile(str(config))))
    torch.save(dict(state_dict=model.state_dict()), str(folder / 'my_yolov4.pth'))
    return folder


def test_commands_are_found():
    assert len(COMMANDS) >= 6 and all('pruned/pruned.py' in command or 'my_yolov4.py' in command
                                      for command in COMMANDS)


@pytest.mark.parametrize('command', COMMANDS)
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
    ((*PRUNED, 'a.onnx', '--batch', 0), 'batch must be a whole number of at least 1, but is 0'),
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


def test_without_the_packages_of_onnx(folder):
    """The file is written, and a sentence says that nothing has run it; int8 needs both."""
    code = (f'import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n'
            'sys.modules.update(onnx=None, onnxruntime=None)\n'
            f'sys.argv = [{str(ROOT / "tools" / "export.py")!r}, *sys.argv[1:]]\n'
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    files = [folder / name for name in PRUNED]
    result = run_code(code, *files, folder / 'alone.onnx', '--nms', '--input-size', 64, 64, *SMALL)
    assert result.returncode == 0, result.stderr
    assert ('not compared with PyTorch: that needs onnxruntime (pip install onnxruntime)'
            in result.stdout)
    if is_installed('onnxruntime'):
        assert open_exported(folder / 'alone.onnx').output_names == ['boxes', 'scores', 'labels']
    result = run_code(code, *files, folder / 'b.onnx', '--int8')
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        'export.py: onnx is needed for int8: pip install onnx')
    assert not (folder / 'b.onnx').exists()
    assert importlib.util.find_spec('onnx')
