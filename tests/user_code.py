# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Code as users write it, which mypy checks against the types of the public functions.

It is not run. ``warn_unused_ignores`` makes mypy fail where a mistake is no longer found.
"""
from pathlib import Path
from typing import Dict, Iterable, List

import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from mmgcp.analysis import count_complexity, measure_peak_memory, record_convs
from mmgcp.compatibility import mend_openmmlab
from mmgcp.datasets import check_voc
from mmgcp.deployment import ExportOptions, export_detector, fused, open_exported
from mmgcp.distillation import spatial_attention
from mmgcp.errors import PruningError, UserError
from mmgcp.pipeline import CompressOptions, compress
from mmgcp.pruning import LayerGroup, PruningPlan, PruningResult, auto_groups, count_channels, prune
from mmgcp.sparsity import select_scale_factors


def prunes(model: nn.Module, images: List[Tensor]) -> float:
    groups = [LayerGroup('backbone', ('backbone.*', ), ratio=0.5)]
    result: PruningResult = prune(model, groups, target_params=0.5, calibration=images,
                                  input_shape=(3, 320, 320))
    result.plan.save(Path('plan.json'))
    before, after = result.params
    lost: Dict[str, Tensor] = PruningPlan.load('plan.json').removed()
    rows = [f'{row.layer}: {row.before} -> {row.after}' for row in result.layers]
    print(len(lost), rows, count_channels(model), auto_groups(model))
    return after / before


def measures(model: nn.Module) -> int:
    params, macs = count_complexity(model, (3, 320, 320))
    convs = record_convs(fused(model, (3, 320, 320)), (3, 320, 320))
    weights: int = sum(conv.weights for conv in convs.values())
    return params + macs + weights + measure_peak_memory(model, lambda: model)


def exports(model: nn.Module, cfg: Config) -> List[Path]:
    exported = export_detector(model, cfg, Path('detector.onnx'), (3, 320, 320), ExportOptions())
    open_exported(exported.files[0], threads=1)
    return exported.files


def compresses(folder: str) -> List[dict]:
    mend_openmmlab()
    check_voc(folder)
    options = CompressOptions(config='a.py', work_dir=Path('out'), tools_dir=Path('tools'))
    try:
        return compress(options)
    except PruningError as error:
        raise UserError(str(error)) from error


def sparse(model: nn.Module, features: Tensor) -> Tensor:
    select_scale_factors(model, groups='auto', input_shape=(3, 320, 320))
    return spatial_attention(features)


def mistaken(model: nn.Module, images: Iterable[Tensor]) -> None:
    prune(images)  # type: ignore[arg-type]
    count_complexity(model, 320)  # type: ignore[arg-type]
    compress('a.py')  # type: ignore[arg-type]
    fused(model, (3, 320, 320)).nothing_such()  # type: ignore[operator]
    text: str = prune(model)  # type: ignore[assignment]
    print(text)
