# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
import pytest
from PIL import Image

from mmgcp.datasets import VOCError, VOCInfo, check_voc, choose_splits, find_voc_root

ANNOTATION = '<annotation><filename>{0}.jpg</filename>{1}</annotation>'
OBJECT = ('<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
          '<ymax>{}</ymax></bndbox></object>')


def write_annotation(root, image_id, *objects):
    text = ''.join(OBJECT.format(*item) for item in objects)
    path = root / 'Annotations' / f'{image_id}.xml'
    path.write_text(ANNOTATION.format(image_id, text))


def write_image(path, width=12, height=10, **options):
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, **options)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / 'VOCdevkit' / 'VOC2007'
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    for image_id in ('a', 'b', 'c'):
        write_image(root / 'JPEGImages' / f'{image_id}.jpg')
    write_annotation(root, 'a', ('dog', 1, 1, 9, 9), ('cat', 2, 3, 2, 3))
    write_annotation(root, 'b', ('dog', 1.5, 1, 9, 9))
    write_annotation(root, 'c')
    (root / 'ImageSets/Main/train.txt').write_text('a\nb\n')
    (root / 'ImageSets/Main/val.txt').write_text('c\n')
    (root / 'ImageSets/Main/dog_train.txt').write_text('a  1\nb -1\n')
    return root


def test_inspect(voc):
    expected = VOCInfo(voc, dict(train=2, val=1), ['cat', 'dog'], 3, dict(cat=1, dog=2))
    assert check_voc(voc) == expected
    assert check_voc(str(voc.parent)) == expected
    assert check_voc(voc, ('dog', 'cat')) == expected


def test_root_errors(voc, tmp_path):
    with pytest.raises(VOCError, match='nowhere does not exist'):
        find_voc_root(tmp_path / 'nowhere')
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (voc.parent / 'VOC2012' / name).mkdir(parents=True)
    with pytest.raises(VOCError, match=r'several VOC data sets \(VOC2007, VOC2012\)'):
        find_voc_root(voc.parent)
    (voc / 'Annotations').rename(voc / 'Labels')
    with pytest.raises(VOCError, match='it has no Annotations'):
        find_voc_root(voc)


def test_no_image_set(voc):
    (voc / 'ImageSets/Main/train.txt').unlink()
    (voc / 'ImageSets/Main/val.txt').unlink()
    with pytest.raises(VOCError, match='no image set'):
        check_voc(voc)


@pytest.mark.parametrize('path', ['JPEGImages/b.jpg', 'Annotations/b.xml'])
def test_missing_file(voc, path):
    (voc / path).unlink()
    with pytest.raises(VOCError, match=f"train.txt names 'b', but .*{path} does not exist"):
        check_voc(voc)


@pytest.mark.parametrize('text', ['c\n\n', 'c \n'])
def test_untidy_image_set(voc, text):
    (voc / 'ImageSets/Main/val.txt').write_text(text)
    with pytest.raises(VOCError, match='val.txt has an empty line or spaces'):
        check_voc(voc)


def test_annotation_is_not_xml(voc):
    (voc / 'Annotations/b.xml').write_text('0 0.5 0.5 0.1 0.1')
    with pytest.raises(VOCError, match='b.xml is not XML: syntax error'):
        check_voc(voc)


def test_unknown_class(voc):
    with pytest.raises(VOCError, match=r"Class 'cat' in .*a.xml is not one of .* \(dog, horse\)"):
        check_voc(voc, ['dog', 'horse'])


@pytest.mark.parametrize('box', [(5, 5, 4, 9), (5, 5, 9, 4), ('nan', 5, 9, 9),
                                 (5, 5, 'inf', 9), ('-inf', 5, 9, 9)])
def test_box_without_size(voc, box):
    write_annotation(voc, 'b', ('dog', *box))
    with pytest.raises(VOCError, match="'dog' in .*b.xml has a box without positive size"):
        check_voc(voc)


def test_incomplete_object(voc):
    path = voc / 'Annotations/b.xml'
    path.write_text('<annotation><object><name>dog</name></object></annotation>')
    with pytest.raises(VOCError, match='b.xml has no box of four numbers'):
        check_voc(voc)
    for name in ('', '<name/>', '<name>  </name>'):
        path.write_text(f'<annotation><object>{name}</object></annotation>')
        with pytest.raises(VOCError, match='b.xml has no name'):
            check_voc(voc)
    write_annotation(voc, 'b', ('dog\ncat', 1, 1, 9, 9))
    with pytest.raises(VOCError, match='b.xml has a name with line breaks or other'):
        check_voc(voc)


@pytest.mark.parametrize('encoding, message', [
    ('klingon', 'unknown encoding'), ('cp932', 'multi-byte encodings are not supported'),
    ('utf-8', 'not well-formed')])
def test_encoding_of_annotation(voc, encoding, message):
    text = f'<?xml version="1.0" encoding="{encoding}"?><annotation/>'
    (voc / 'Annotations/b.xml').write_bytes(text.encode() + b'\xff\xfe')
    with pytest.raises(VOCError, match=f'b.xml is not XML: .*{message}'):
        check_voc(voc)


def test_encoding_of_image_set(voc):
    path = voc / 'ImageSets/Main/val.txt'
    path.write_bytes(b'\xef\xbb\xbfc\n')  # a byte-order mark is not part of the name
    assert check_voc(voc).splits == dict(train=2, val=1)
    path.write_bytes(b'caf\xe9\n')
    with pytest.raises(VOCError, match='val.txt is not text in UTF-8'):
        check_voc(voc)


@pytest.mark.parametrize('content', [b'', b'no image', b'\xff\xd8\xff\xe0\x00\x10JFIF'])
def test_image_that_cannot_be_read(voc, content):
    (voc / 'JPEGImages/b.jpg').write_bytes(content)
    with pytest.raises(VOCError, match='b.jpg is no image that can be read'):
        check_voc(voc)


def write_size(root, width, height):
    (root / 'Annotations/b.xml').write_text(
        f'<annotation><size><width>{width}</width><height>{height}</height></size></annotation>')


@pytest.mark.parametrize('width, height', [
    ('wide', 10), ('', 10), (12.5, 10), (0, 0), (-12, 10), (10**9, 10), ('9' * 5000, 10)])
def test_size_that_is_none(voc, width, height):
    write_size(voc, width, height)
    with pytest.raises(VOCError, match='b.xml does not say the size of its image'):
        check_voc(voc)


def test_size_of_another_image(voc):
    write_size(voc, 12, 10)
    check_voc(voc)
    write_size(voc, 12, 11)
    with pytest.raises(VOCError, match='b.xml says that the image has 12×11 pixels, but.* 12×10'):
        check_voc(voc)


@pytest.mark.parametrize('box, inside', [
    ((0, 0, 12, 10), True), ((1, 1, 13, 11), True), ((-5, 1, 6, 10), True),
    ((-6, 1, 5, 10), False), ((8, 1, 17, 10), True), ((9, 1, 17, 10), False),
    ((20, 1, 30, 9), False), ((1, 1, 1e9, 10), False)])
def test_box_outside(voc, box, inside):
    """The image has 12×10 pixels; boxes that stick out a little are usual."""
    write_annotation(voc, 'b', ('dog', *box))
    if inside:
        check_voc(voc)
        return
    with pytest.raises(VOCError, match="'dog' in .*b.xml has a box of which most lies outside"):
        check_voc(voc)


def test_image_that_exif_turns(voc):
    """Boxes are in the image as it is shown."""
    exif = Image.Exif()
    exif[274] = 6  # a quarter of a turn
    write_image(voc / 'JPEGImages/b.jpg', width=10, height=40, exif=exif)
    write_annotation(voc, 'b', ('dog', 21, 1, 40, 10))
    check_voc(voc)
    write_image(voc / 'JPEGImages/b.jpg', width=10, height=40)
    with pytest.raises(VOCError, match='outside of the image of 10×40 pixels'):
        check_voc(voc)


@pytest.mark.parametrize('splits, expected', [
    (dict(train=1, val=1, trainval=2, test=1), (['trainval'], 'test')),
    (dict(train=1, val=1, test=1), (['train', 'val'], 'test')),
    (dict(train=1, test=1), (['train'], 'test')),
    (dict(train=1, val=1, trainval=2), (['train'], 'val')),
    (dict(train=1, val=1, trainval=2, test=0), (['train'], 'val'))])
def test_choose_splits(tmp_path, splits, expected):
    assert choose_splits(VOCInfo(tmp_path, splits, [], 0, {})) == expected


@pytest.mark.parametrize('names', [['train'], ['trainval', 'val'], ['test'], []])
def test_no_splits_to_choose(tmp_path, names):
    info = VOCInfo(tmp_path, dict.fromkeys(names, 1), [], 0, {})
    with pytest.raises(VOCError, match=f'only has images in: {", ".join(names) or "none"}'):
        choose_splits(info)
