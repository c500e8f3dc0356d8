# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import ConfigType, OptInstanceList
from mmengine.dist import get_dist_info
from mmengine.structures import InstanceData
from mmyolo.models.dense_heads import YOLOv5Head
from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.checks import CONFIG, checked, either, instance_of


@MODELS.register_module()
class YOLOv4Head(YOLOv5Head):
    """Head of `YOLOv4 <https://arxiv.org/abs/2004.10934>`_.

    Inference is that of :class:`mmyolo.models.YOLOv5Head` with another box coder. The loss
    follows Darknet. An anchor is positive for a ground truth if their shapes overlap by more
    than ``match_iou_thr``, or if it is the best of all anchors of all levels; it is so in each
    cell from which the box coder can reach the centre of the ground truth. The box loss is
    CIoU, the objectness and class losses are binary cross-entropy. The objectness of negatives
    that predict a ground truth with an IoU above ``ignore_iou_thr`` is ignored.

    It deviates from Darknet in two points. Darknet takes only the cell that the centre lies
    in; here, with ``scale_x_y`` s, a neighbouring cell also counts if the centre is within
    (s - 1) / 2 of it. That hardly matters at YOLOv4's 1.05 to 1.2, and gives three cells
    instead of one at 2, as in YOLOv5. And the losses are averaged and weighted as in MMYOLO
    instead of being summed.

    Args:
        head_module (dict): Config of the layers.
        prior_generator (dict): Config of the anchors.
        bbox_coder (dict): Config of the box coder.
        loss_cls (dict): Config of the classification loss.
        loss_bbox (dict): Config of the box loss, which gets boxes as (x1, y1, x2, y2).
        loss_obj (dict): Config of the objectness loss.
        match_iou_thr (float): Shape overlap above which an anchor is positive.
            Defaults to 0.213, Darknet's ``iou_thresh``.
        ignore_iou_thr (float): Overlap above which a negative is ignored.
            Defaults to 0.7, Darknet's ``ignore_thresh``.
        objectness_smooth (bool): Take the CIoU of its box instead of 1 as the objectness
            target of a positive, as Darknet's option of that name does.
            Defaults to True.
        obj_level_weights (List[float]): Weight of the objectness loss of each level.
            Defaults to [4.0, 1.0, 0.4].
        **kwargs: See :class:`mmyolo.models.YOLOv5Head`.
    """

    @checked(head_module=either(CONFIG, instance_of(nn.Module, text=''), text=CONFIG.text),
             prior_generator=CONFIG, bbox_coder=CONFIG, loss_bbox=CONFIG)
    def __init__(self,
                 head_module: ConfigType,
                 prior_generator: ConfigType = dict(
                     type='mmdet.YOLOAnchorGenerator',
                     base_sizes=[[(12, 16), (19, 36), (40, 28)], [(36, 75), (76, 55), (72, 146)],
                                 [(142, 110), (192, 243), (459, 401)]],
                     strides=[8, 16, 32]),
                 bbox_coder: ConfigType = dict(type='mmgcp.YOLOv4BBoxCoder'),
                 loss_bbox: ConfigType = dict(
                     type='IoULoss',
                     iou_mode='ciou',
                     bbox_format='xyxy',
                     eps=1e-7,
                     reduction='mean',
                     loss_weight=0.05,
                     return_iou=True),
                 match_iou_thr: float = 0.213,
                 ignore_iou_thr: float = 0.7,
                 objectness_smooth: bool = True,
                 **kwargs):
        super().__init__(
            head_module,
            prior_generator=prior_generator,
            bbox_coder=bbox_coder,
            loss_bbox=loss_bbox,
            **kwargs)
        self.match_iou_thr = match_iou_thr
        self.ignore_iou_thr = ignore_iou_thr
        self.objectness_smooth = objectness_smooth

    def loss_by_feat(self,
                     cls_scores: Sequence[Tensor],
                     bbox_preds: Sequence[Tensor],
                     objectnesses: Sequence[Tensor],
                     batch_gt_instances: Union[Tensor, Sequence[InstanceData]],
                     batch_img_metas: Sequence[dict],
                     batch_gt_instances_ignore: OptInstanceList = None) -> dict:
        """Compute the losses from the raw predictions.

        Args:
            cls_scores (Sequence[Tensor]): (N, A * num_classes, H, W) for each level.
            bbox_preds (Sequence[Tensor]): (N, A * 4, H, W) for each level.
            objectnesses (Sequence[Tensor]): (N, A, H, W) for each level.
            batch_gt_instances (Tensor | Sequence[InstanceData]): Ground truths,
                either (M, 6) as (image index, label, x1, y1, x2, y2) in pixels or
                one ``InstanceData`` for each image.
            batch_img_metas (Sequence[dict]): Not used.
            batch_gt_instances_ignore (list[InstanceData], optional): Not used.

        Returns:
            dict[str, Tensor]: ``loss_cls``, ``loss_obj`` and ``loss_bbox``.
        """
        targets = self._stack_targets(batch_gt_instances).to(cls_scores[0].device)
        matches = self._match_anchors(targets[:, 4:] - targets[:, 2:4])
        featmap_sizes = [pred.shape[-2:] for pred in bbox_preds]
        mlvl_priors = self.prior_generator.grid_priors(
            featmap_sizes, device=bbox_preds[0].device)

        batch_size = len(bbox_preds[0])
        losses = [
            self._loss_single(level, *predictions, targets, matches[:, level])
            for level, predictions in enumerate(
                zip(cls_scores, bbox_preds, objectnesses, mlvl_priors))
        ]
        _, world_size = get_dist_info()
        names = ('loss_cls', 'loss_obj', 'loss_bbox')
        return {
            name: sum(level_losses) * batch_size * world_size
            for name, level_losses in zip(names, zip(*losses))
        }

    def _stack_targets(self, gts: Union[Tensor, Sequence[InstanceData]]) -> Tensor:
        """Turn either form of ground truths into (M, 6): image index, label, x1, y1, x2, y2."""
        if isinstance(gts, Tensor):
            return gts
        rows = []
        for index, instances in enumerate(gts):
            boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
            labels = instances.labels[:, None].to(boxes)
            rows.append(torch.cat((torch.full_like(labels, index), labels, boxes), dim=1))
        return torch.cat(rows)

    def _match_anchors(self, sizes: Tensor) -> Tensor:
        """Find the anchors that are positive for each ground truth because of their shapes.

        Args:
            sizes (Tensor): Widths and heights (M, 2) in pixels.

        Returns:
            Tensor: Boolean (M, num_levels, A).
        """
        strides = sizes.new_tensor(self.featmap_strides)
        anchors = self.priors_base_sizes.to(sizes) * strides[:, None, None]
        sizes = sizes[:, None, None]
        intersections = torch.min(sizes, anchors).prod(-1)
        unions = sizes.prod(-1) + anchors.prod(-1) - intersections
        ious = (intersections / unions).flatten(1)
        positive = ious > self.match_iou_thr
        if len(ious):
            positive[torch.arange(len(ious), device=ious.device), ious.argmax(1)] = True
        return positive.view(-1, self.num_levels, self.num_base_priors)

    def _loss_single(self, level: int, cls_score: Tensor, bbox_pred: Tensor, objectness: Tensor,
                     priors: Tensor, targets: Tensor,
                     matches: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Compute the class, objectness and box losses of one level.

        Args:
            level (int): Index of the level.
            cls_score (Tensor): (N, A * num_classes, H, W).
            bbox_pred (Tensor): (N, A * 4, H, W).
            objectness (Tensor): (N, A, H, W).
            priors (Tensor): Anchors (H * W * A, 4) as (x1, y1, x2, y2) in pixels.
            targets (Tensor): (M, 6), see :meth:`_stack_targets`.
            matches (Tensor): Boolean (M, A), see :meth:`_match_anchors`.

        Returns:
            tuple[Tensor]: The three losses.
        """
        batch_size, num_anchors, height, width = objectness.shape
        stride = self.featmap_strides[level]

        def last(pred: Tensor) -> Tensor:
            """(N, A * C, H, W) to (N, H, W, A, C) in single precision."""
            pred = pred.float().view(batch_size, num_anchors, -1, height, width)
            return pred.permute(0, 3, 4, 1, 2)

        cls_score, bbox_pred, objectness = last(cls_score), last(bbox_pred), last(objectness)
        objectness = objectness[..., 0]
        priors = priors.view(height, width, num_anchors, 4)

        gt_inds, anchor_inds = matches.nonzero(as_tuple=True)
        centers = (targets[gt_inds, 2:4] + targets[gt_inds, 4:]) / 2 / stride
        match_inds, x_inds, y_inds = self._cells(centers, stride, width, height)
        positives = targets[gt_inds[match_inds]]
        cells = (positives[:, 0].long(), y_inds, x_inds, anchor_inds[match_inds])

        target_obj = torch.zeros_like(objectness)
        weight_obj = 1 - self._overlaps_some_target(bbox_pred, priors, targets, stride).float()
        loss_cls, loss_box = cls_score.sum() * 0, bbox_pred.sum() * 0
        if len(positives):
            boxes = self.bbox_coder.decode(priors[cells[1:]], bbox_pred[cells], stride)
            loss_box, ious = self.loss_bbox(boxes, positives[:, 2:])
            if self.num_classes > 1:
                one_hot = torch.zeros_like(cls_score[cells])
                one_hot[torch.arange(len(one_hot)), positives[:, 1].long()] = 1
                loss_cls = self.loss_cls(cls_score[cells], one_hot)
            target_obj[cells] = ious.detach().clamp(0) if self.objectness_smooth else 1.
            weight_obj[cells] = 1.
        loss_obj = self.loss_obj(
            objectness, target_obj, weight=weight_obj, avg_factor=objectness.numel())
        return loss_cls, loss_obj * self.obj_level_weights[level], loss_box

    def _cells(self, centers: Tensor, stride: int, width: int,
               height: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Find the cells whose predictions can reach the given centres.

        Args:
            centers (Tensor): Centres (K, 2) in units of cells.
            stride (int): Stride of the level in pixels.
            width (int): Number of cells in a row.
            height (int): Number of cells in a column.

        Returns:
            tuple[Tensor]: Index of the centre, column and row of each cell, (P, ) each.
        """
        limits = centers.new_tensor((width, height)) - 1
        own = torch.min(centers.floor().clamp(min=0), limits)
        # The own cell comes last: where cells coincide, its objectness target is the one that stays
        steps = centers.new_tensor([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])
        cells = own + steps[:, None]
        reach = self.bbox_coder.scale_x_y[stride] / 2
        found = ((centers - cells - 0.5).abs() < reach).all(-1)
        found &= ((cells >= 0) & (cells <= limits)).all(-1)
        found[-1] = True
        steps_found, match_inds = found.nonzero(as_tuple=True)
        x_inds, y_inds = cells[steps_found, match_inds].long().unbind(-1)
        return match_inds, x_inds, y_inds

    @torch.no_grad()
    def _overlaps_some_target(self, bbox_pred: Tensor, priors: Tensor, targets: Tensor,
                              stride: int) -> Tensor:
        """Find the predicted boxes that overlap a ground truth of their image enough to be ignored.

        Args:
            bbox_pred (Tensor): (N, H, W, A, 4).
            priors (Tensor): (H, W, A, 4).
            targets (Tensor): (M, 6), see :meth:`_stack_targets`.
            stride (int): Stride of the level in pixels.

        Returns:
            Tensor: Boolean (N, H, W, A).
        """
        shape = bbox_pred.shape[:-1]
        if len(targets) == 0:
            return bbox_pred.new_zeros(shape, dtype=torch.bool)
        boxes = self.bbox_coder.decode(priors, bbox_pred, stride).view(shape[0], -1, 4)
        ious = bbox_overlaps(boxes, self._pad_targets(targets, shape[0]))
        return (ious.amax(-1) > self.ignore_iou_thr).view(shape)

    @staticmethod
    def _pad_targets(targets: Tensor, batch_size: int) -> Tensor:
        """Sort targets (M, 6) by image into (batch_size, G, 4), filled up with empty boxes."""
        order = targets[:, 0].argsort()
        image_inds = targets[order, 0].long()
        counts = image_inds.bincount(minlength=batch_size)
        starts = counts.cumsum(0) - counts
        positions = torch.arange(len(targets), device=targets.device) - starts[image_inds]
        boxes = targets.new_zeros(batch_size, int(counts.max()), 4)
        boxes[image_inds, positions] = targets[order, 2:]
        return boxes
