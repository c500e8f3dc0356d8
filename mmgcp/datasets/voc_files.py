# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reads and checks the single files of a data set in PASCAL VOC's layout.

Boxes are ``xmin ymin xmax ymax``, counted from one; the last pixel belongs to the object.
"""
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from PIL import Image

from mmgcp.errors import VOCError

BOX_KEYS = ('xmin', 'ymin', 'xmax', 'ymax')
MAX_SIDE = 65535  # of an image in pixels, which is JPEG's limit
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height

PathLike = Union[str, Path]


class VOCObject(NamedTuple):
    """An annotated object: its class, and its box (xmin, ymin, xmax, ymax) in pixels."""
    name: str
    box: Tuple[float, ...]


class Annotation(NamedTuple):
    """The objects of an image and, if annotated, the image's (width, height) in pixels."""
    objects: List[VOCObject]
    size: Optional[Tuple[int, int]]

    @property
    def names(self) -> List[str]:
        """The class of each object."""
        return [item.name for item in self.objects]


def read_lines(path: Path) -> List[str]:
    """Read the lines of an image set.

    Raises:
        VOCError: It is not text in UTF-8.
    """
    try:
        return path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise VOCError(f'{path} is not text in UTF-8: {error}.') from error


def read_annotation(xml_path: PathLike) -> Annotation:
    """Read an annotation, and check all that can be checked without the image.

    Args:
        xml_path (str | Path): The annotation.

    Returns:
        Annotation: What is in it.

    Raises:
        VOCError: The annotation cannot be read, an object has no name or no box of four numbers
            with a positive size, or the size of the image is none.
    """
    try:
        root = ElementTree.parse(str(xml_path)).getroot()
    except FileNotFoundError as error:
        raise VOCError(f'The annotation {xml_path} does not exist.') from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        # The latter two: an encoding that is unknown, or that the parser does not read
        raise VOCError(f'The annotation {xml_path} is not XML: {error}.') from error
    objects = [_read_object(element, xml_path) for element in root.findall('object')]
    return Annotation(objects, _read_size(root, xml_path))


def read_image_size(path: PathLike) -> Tuple[int, int]:
    """Return (width, height) of an image in pixels, as it is after EXIF has turned it.

    Only the head of the file is read.

    Raises:
        VOCError: It is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # Pillow's readers raise anything on broken files
        raise VOCError(f'{path} is no image that can be read.') from error
    return (height, width) if turned else (width, height)


def check_against_image(annotation: Annotation, size: Tuple[int, int],
                        xml_path: PathLike) -> None:
    """Check that an annotation is about an image of this (width, height).

    Raises:
        VOCError: It says that the image has another size, or most of a box lies outside.
    """
    if annotation.size is not None and sorted(annotation.size) != sorted(size):
        raise VOCError('{} says that the image has {}×{} pixels, but it has {}×{}.'.format(
            xml_path, *annotation.size, *size))
    for name, box in annotation.objects:
        inside = 1.
        for low, high, side in zip(box[:2], box[2:], size):
            length = high - low + 1
            inside *= max(min(high, side) - max(low, 1) + 1, 0) / length
        if inside < 0.5:
            raise VOCError(f'An object {name!r} in {xml_path} has a box of which most lies '
                           f'outside of the image of {size[0]}×{size[1]} pixels: '
                           f'{" ".join(f"{value:g}" for value in box)}.')


def check_class_names(names: Sequence[str], classes: Sequence[str], where: PathLike) -> None:
    """Raise a :class:`VOCError` if one of ``names`` is not one of ``classes``."""
    for name in names:
        if name not in classes:
            raise VOCError(f'Class {name!r} in {where} is not one of the known classes '
                           f'({", ".join(classes)}).')


def _read_object(element: ElementTree.Element, xml_path: PathLike) -> VOCObject:
    name = element.findtext('name')
    if not name or not name.strip():
        raise VOCError(f'An object in {xml_path} has no name.')
    if not name.isprintable():
        raise VOCError(f'An object in {xml_path} has a name with line breaks or other characters '
                       f'that cannot be printed: {name!r}.')
    try:
        box = tuple(float(element.findtext(f'bndbox/{key}')) for key in BOX_KEYS)
    except (TypeError, ValueError) as error:
        raise VOCError(f'An object {name!r} in {xml_path} has no box of four numbers.') from error
    xmin, ymin, xmax, ymax = box
    # The last pixel belongs to the object: with xmin == xmax it is one pixel wide.
    if not (all(map(math.isfinite, box)) and xmax >= xmin and ymax >= ymin):
        raise VOCError(f'An object {name!r} in {xml_path} has a box without positive size: '
                       f'{" ".join(f"{value:g}" for value in box)}.')
    return VOCObject(name, box)


def _read_size(root: ElementTree.Element, xml_path: PathLike) -> Optional[Tuple[int, int]]:
    element = root.find('size')
    if element is None:
        return None
    texts = [element.findtext(key) for key in ('width', 'height')]
    try:
        size = tuple(int(text) for text in texts)
    except (TypeError, ValueError):
        size = (0, 0)
    if not all(0 < side <= MAX_SIDE for side in size):
        raise VOCError(f'{xml_path} does not say the size of its image in pixels, but: '
                       f'{" ".join(str(text) for text in texts)}.')
    return size
