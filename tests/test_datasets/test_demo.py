# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
from scripts import load_script

from mmgcp.datasets import check_voc, choose_splits
from mmgcp.datasets import demo as demo_module
from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.datasets.demo_images import box_iou, mask_to_box, paint, render_image, shape_mask
from mmgcp.errors import UserError

OPTIONS = DemoOptions(num_train=4, num_val=2, num_test=2, size=128, seed=5)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'shapes'
    assert make_demo_dataset(root, OPTIONS)
    return root


def read_files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_layout(demo):
    info = check_voc(demo, CLASSES)
    assert info.splits == dict(test=2, train=4, trainval=6, val=2)
    assert info.num_images == 8
    assert choose_splits(info) == (['trainval'], 'test')
    assert set(info.classes) <= set(CLASSES)
    assert [path.name for path in demo.parent.iterdir()] == ['shapes']
    lists = {path.stem: path.read_text().split() for path in demo.glob('ImageSets/Main/*')}
    assert lists['train'] + lists['val'] == lists['trainval']
    assert not set(lists['trainval']) & set(lists['test'])


def test_annotations_fit_images(demo):
    for path in sorted((demo / 'Annotations').iterdir()):
        root = ElementTree.parse(str(path)).getroot()
        image = cv2.imread(str(demo / 'JPEGImages' / root.findtext('filename')))
        height, width = image.shape[:2]
        assert max(height, width) == 128
        size = [int(root.findtext(f'size/{key}')) for key in ('width', 'height', 'depth')]
        assert size == [width, height, 3]
        assert 1 <= len(root.findall('object')) <= 9
        for element in root.findall('object'):
            keys = ('xmin', 'ymin', 'xmax', 'ymax')
            xmin, ymin, xmax, ymax = (int(element.findtext(f'bndbox/{key}')) for key in keys)
            assert 1 <= xmin and xmax <= width and 1 <= ymin and ymax <= height
            assert min(xmax - xmin, ymax - ymin) + 1 >= 0.08 * 128 - 1


def test_same_seed_same_bytes(demo, tmp_path):
    make_demo_dataset(tmp_path / 'again', OPTIONS)
    assert read_files(tmp_path / 'again') == read_files(demo)
    other = DemoOptions(num_train=4, num_val=2, num_test=2, size=128, seed=6)
    make_demo_dataset(tmp_path / 'other', other)
    assert not set(read_files(tmp_path / 'other').values()) & {
        data for path, data in read_files(demo).items() if path.suffix == '.jpg'}


def test_complete_dataset_is_left(demo):
    times = {path: path.stat().st_mtime_ns for path in demo.rglob('*')}
    assert not make_demo_dataset(demo, OPTIONS)
    assert times == {path: path.stat().st_mtime_ns for path in demo.rglob('*')}


def test_other_folders_are_refused(demo, tmp_path):
    with pytest.raises(FileExistsError, match='other options'):
        make_demo_dataset(demo, DemoOptions(num_train=9, size=128))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileExistsError, match='not a demo data set'):
        make_demo_dataset(tmp_path / 'empty', OPTIONS)


def test_damaged_dataset_is_refused(tmp_path):
    root = tmp_path / 'damaged'
    options = DemoOptions(num_train=1, num_val=1, num_test=1, size=128)
    make_demo_dataset(root, options)
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text('')
    with pytest.raises(FileExistsError, match='damaged.*image sets'):
        make_demo_dataset(root, options)
    next((root / 'JPEGImages').iterdir()).unlink()
    with pytest.raises(FileExistsError, match='damaged.*does not exist'):
        make_demo_dataset(root, options)
    (root / 'dataset.json').write_text('{')
    with pytest.raises(FileExistsError, match='damaged'):
        make_demo_dataset(root, options)


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(root, image_id, *args):
        if image_id == '000002':
            raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, '_write_example', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo_dataset(tmp_path / 'shapes', OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options', [
    dict(num_train=0), dict(num_val=-1), dict(num_test=0), dict(size=64), dict(seed=-1)])
def test_options_are_checked(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f'{name} must .* is {value}'):
        DemoOptions(**options)


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('angle', [0.0, 0.4, 2.0])
def test_box_is_tight_on_painted_pixels(name, angle):
    """The box from the mask against a search over the pixels that paint() has changed."""
    image = np.full((90, 110, 3), 10, np.float32)
    mask = shape_mask(name, (50.3, 44.8), 40, angle, 1.1, (90, 110))
    paint(image, mask, (210, 210, 210))
    changed = [(x, y) for y in range(90) for x in range(110) if image[y, x, 0] >= 110]
    xs, ys = zip(*changed)
    assert mask_to_box(mask >= 0.5) == (min(xs), min(ys), max(xs), max(ys))
    assert abs(min(max(xs) - min(xs), max(ys) - min(ys)) + 1 - 40) <= 2
    assert np.all(image[mask == 0] == 10) and np.all(image[mask == 1] == 210)


def test_boxes_against_geometry():
    disc = shape_mask('disc', (40, 30), 20, 0.0, 1.0, (64, 80)) >= 0.5
    assert mask_to_box(disc) == (30, 20, 49, 39)
    assert disc.sum() == pytest.approx(np.pi * 100, rel=0.03)
    square = shape_mask('square', (40, 30), 20, 0.0, 1.0, (64, 80)) >= 0.5
    assert mask_to_box(square) == (30, 20, 49, 39)
    assert square.sum() == 400
    diamond = shape_mask('square', (40, 30), 20, np.pi / 4, 1.0, (64, 80)) >= 0.5
    assert diamond.sum() == pytest.approx(200, rel=0.07)  # by version of OpenCV


def test_objects_overlap_little():
    for seed in range(6):
        image, objects = render_image(np.random.default_rng(seed), 128)
        assert image.dtype == np.uint8
        covered = np.sum([item.visible for item in objects], axis=0)
        assert covered.max() == 1
        for index, first in enumerate(objects):
            assert first.visible.sum() >= 0.75 * first.area
            for second in objects[:index]:
                assert box_iou(first.box, second.box) < 0.2


def test_unknown_shape():
    with pytest.raises(ValueError, match='must be one of cross.*heart'):
        shape_mask('heart', (5, 5), 4, 0.0, 1.0, (10, 10))


def test_empty_mask_has_no_box():
    with pytest.raises(ValueError, match='no box'):
        mask_to_box(np.zeros((4, 4), bool))


def test_options_file(demo):
    options = json.loads((demo / 'dataset.json').read_text())
    assert options['seed'] == 5 and options['num_test'] == 2


def test_command_line(tmp_path, capsys):
    main = load_script('dataset_converters/make_demo_dataset.py').main
    args = [str(tmp_path / 'shapes'), '--num-train', '1', '--num-val', '1', '--num-test', '1']
    main(args)
    main(args)
    output = capsys.readouterr().out
    assert 'Made' in output and 'already complete' in output
    with pytest.raises(FileExistsError, match='other options'):
        main([*args, '--seed', '1'])
    with pytest.raises(UserError, match='size must be'):
        main([*args, '--size', '1'])
