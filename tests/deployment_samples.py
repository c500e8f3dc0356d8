# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Narrow detectors of all families, to be exported."""
import torch
from families import FAMILIES
from mmengine.config import Config
from pruning_samples import randomise
from scripts import ROOT

from mmgcp.nn.forward import flatten_tensors, run_on_noise, working_shape
from mmgcp.pruning import prune
from mmgcp.utils.config import build_detector, load_config

YOLOV4 = 'yolov4-n'
# Those of MMYOLO, and MMDetection's of one stage, of which only the raw outputs are exported
MMYOLO = [YOLOV4, *(name for name, (path, _) in FAMILIES.items() if path.startswith('mmyolo'))]
ONE_STAGE = ['ssd300', 'ssdlite', 'yolov3', 'retinanet-r50', 'retinanet-x101', 'fcos-r50']
WITHOUT_BOXES = ['rtmdet-ins-s']  # whose predictions are masks, too
REPRESENTATIVES = [YOLOV4, 'yolov5-n', 'yolov6-n', 'yolov7-tiny', 'yolov8-n', 'yolox-nano',
                   'rtmdet-tiny', 'ppyoloe-plus-s']
PARTS = ('backbone', 'neck', 'bbox_head.head_module')


class Answers:
    """A file that answers what it is told to."""

    def __init__(self, answers):
        self.answers = answers

    def run(self, images):
        return self.answers


def narrow_config(name: str) -> Config:
    """The config of a family with an eighth of the channels and three classes."""
    width = 0.25 if 'e2e' in name else 0.125  # of which its layers do not fit together
    options = dict.fromkeys((f'model.{part}.widen_factor' for part in PARTS), width)
    options.update({'model.bbox_head.head_module.num_classes': 3,
                    'model.test_cfg.nms_pre': 200, 'model.test_cfg.score_thr': 0.05,
                    'model.test_cfg.max_per_img': 30})
    if name == YOLOV4:
        return load_config(str(ROOT / 'configs/yolov4/yolov4_n_fast_1xb8-60e_voc-320.py'),
                           {**options, 'model.backbone.deepen_factor': 0.33,
                            'model.neck.deepen_factor': 0.33})
    path, given = FAMILIES[name]
    if not path.startswith('mmyolo'):
        return load_config(path, {**given, 'model.backbone.init_cfg': None})
    return load_config(path, {**given, **options, 'model.backbone.init_cfg': None})


@torch.no_grad()
def _moderate(model: torch.nn.Module) -> None:
    """Keep predictions so small that scores differ, instead of being 0 or 1."""
    if not hasattr(model, 'bbox_head'):
        return
    largest = max(float(item.abs().max()) for item in flatten_tensors(
        run_on_noise(model, working_shape(model))))
    for name, module in model.bbox_head.named_modules():
        if largest > 8 and 'pred' in name and isinstance(module, torch.nn.Conv2d):
            module.weight.mul_(8 / largest)


def narrow_detector(cfg: Config, ratio: float = 0., seed: int = 0) -> torch.nn.Module:
    """A detector with random weights and statistics in eval mode, pruned by a ratio."""
    torch.manual_seed(seed)
    model = randomise(build_detector(cfg), seed).float().eval()
    _moderate(model)
    if ratio:
        size = 300 if 'SSD' in type(model).__name__ or 'Single' in type(model).__name__ else 128
        before = sum(parameter.numel() for parameter in model.parameters())
        prune(model, ratio=ratio, input_shape=(3, size, size), criterion=dict(type='mmgcp.L1Norm'),
              compensate=False)
        assert sum(parameter.numel() for parameter in model.parameters()) < 0.9 * before
    return model.eval()
