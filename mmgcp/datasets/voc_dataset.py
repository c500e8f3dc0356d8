# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Any, List

from mmdet.datasets import XMLDataset
from mmengine.fileio import get_local_path
from mmyolo.datasets.yolov5_coco import BatchShapePolicyDataset

from mmgcp.errors import VOCError
from mmgcp.registry import DATASETS

from .voc_files import check_class_names, read_annotation


@DATASETS.register_module()
class VOCFormatDataset(BatchShapePolicyDataset, XMLDataset):
    """Any folder in PASCAL VOC's layout, with any classes.

    MMYOLO's ``YOLOv5VOCDataset`` is meant for PASCAL VOC itself: it silently skips objects of
    other classes, and if the path of the folder contains ``VOC2007`` or ``VOC2012``,
    ``mmdet.VOCMetric`` prints the twenty VOC names whatever the classes are.

    Args:
        strict_classes (bool): Raise :class:`VOCError` for an object whose class is not in
            ``metainfo`` instead of skipping it, and for an annotation that cannot be read.
            Defaults to True.
        **kwargs: Arguments of ``mmdet.XMLDataset``, and ``batch_shapes_cfg``. ``data_root`` is
            the folder with JPEGImages, ``ann_file`` is for example
            ``'ImageSets/Main/train.txt'``, ``data_prefix`` defaults to
            ``dict(sub_data_root='')``, and ``metainfo`` must be ``dict(classes=(...))``.
    """

    def __init__(self, *args: Any, strict_classes: bool = True, **kwargs: Any) -> None:
        self.strict_classes = strict_classes
        kwargs.setdefault('data_prefix', dict(sub_data_root=''))
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> List[dict]:
        """Load the annotations of the image set ``ann_file``."""
        if not self._metainfo.get('classes'):
            raise VOCError(f'{type(self).__name__} needs metainfo=dict(classes=(...))')
        return super().load_data_list()

    def parse_data_info(self, img_info: dict) -> dict:
        """Parse one annotation, and check it first if ``strict_classes``."""
        if self.strict_classes:
            self._check_annotation(img_info['xml_path'])
        return super().parse_data_info(img_info)

    def _check_annotation(self, xml_path: str) -> None:
        with get_local_path(xml_path, backend_args=self.backend_args) as local_path:
            annotation = read_annotation(local_path)
        check_class_names(annotation.names, self._metainfo['classes'], xml_path)
