# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Sequence, Union

import torch
from mmdet.models.task_modules.coders import BaseBBoxCoder
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import COUNT, checked, list_of, number_in


@TASK_UTILS.register_module()
class YOLOv4BBoxCoder(BaseBBoxCoder):
    r"""Box coder of `YOLOv4 <https://arxiv.org/abs/2004.10934>`_.

    With the level's ``scale_x_y`` s, a box is predicted relative to its grid cell
    (c_x, c_y) and its anchor (a_w, a_h) as

    .. math::
        b_x = stride (c_x + s \sigma(t_x) - (s - 1) / 2), \quad b_w = a_w e^{t_w}

    and likewise for y and the height.

    Args:
        scale_x_y (Sequence[float]): Grid sensitivity of each level.
            Defaults to (1.2, 1.1, 1.05).
        strides (Sequence[int]): Stride of each level in pixels.
            Defaults to (8, 16, 32).

    Raises:
        UserError: ``scale_x_y`` and ``strides`` have different lengths.
    """

    @checked(scale_x_y=list_of(number_in(0, 10, open_low=True), 'must be a list of factors to 10'),
             strides=list_of(COUNT, 'must be a list of strides'))
    def __init__(self,
                 scale_x_y: Sequence[float] = (1.2, 1.1, 1.05),
                 strides: Sequence[int] = (8, 16, 32)):
        super().__init__()
        if len(scale_x_y) != len(strides):
            raise UserError('scale_x_y and strides must have one value for each level, '
                            f'but got {scale_x_y} and {strides}')
        self.scale_x_y = dict(zip(strides, scale_x_y))

    def encode(self, **kwargs):
        """Not supported, because the loss compares decoded boxes."""
        raise NotImplementedError('YOLOv4 computes its box loss on decoded boxes')

    def decode(self, priors: Tensor, pred_bboxes: Tensor,
               stride: Union[Tensor, int]) -> Tensor:
        """Decode predictions to boxes in pixels.

        Args:
            priors (Tensor): Anchors centred in their cells, (..., 4) as
                (x1, y1, x2, y2) in pixels.
            pred_bboxes (Tensor): Raw predictions (t_x, t_y, t_w, t_h), (..., 4).
            stride (Tensor | int): Stride of each prediction in pixels, (...) or one number.

        Returns:
            Tensor: (..., 4) as (x1, y1, x2, y2) in pixels.
        """
        centers = (priors[..., :2] + priors[..., 2:]) / 2
        sizes = priors[..., 2:] - priors[..., :2]
        xy = centers + self.decode_offsets(pred_bboxes[..., :2], stride)
        half_wh = pred_bboxes[..., 2:].exp() * sizes / 2
        return torch.cat((xy - half_wh, xy + half_wh), dim=-1)

    def decode_offsets(self, pred_xy: Tensor, stride: Union[Tensor, int]) -> Tensor:
        """Decode raw centres (..., 2) to offsets from the middle of the cell in pixels."""
        # c + s * sigmoid(t) - (s - 1) / 2 relative to the middle of the cell, c + 1 / 2
        offsets = pred_xy.sigmoid() - 0.5
        if isinstance(stride, Tensor):
            factors = torch.zeros_like(stride)
            for level_stride, scale in self.scale_x_y.items():
                factors = torch.where(stride == level_stride, stride * scale, factors)
            return offsets * factors[..., None]
        return offsets * (stride * self.scale_x_y[stride])
